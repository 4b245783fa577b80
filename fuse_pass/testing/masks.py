"""One dropout mask for everybody: eager, compiled and fused models draw theirs from a seed that the tester sets.

The mask of a dropout is a function of the seed, p and the flat index of an element (`ops.rng.keep_mask`), so that any
split into rows and columns gives the same, and eager PyTorch becomes an exact reference of a fused dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from fuse_pass.inductor import compat
from fuse_pass.ops import rng

_LIBRARY = torch.library.Library("fuse_pass_testing", "DEF")


class _Draws:
    """The seed in force, and whether something random was asked for."""

    seed = 0
    any = False


def _seed(*, device: torch.device) -> Tensor:
    _Draws.any = True
    return torch.tensor(_Draws.seed, dtype=torch.int64, device=device)


def _dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Keeps the strides of x, as `F.dropout` does."""
    if p == 1:
        return torch.zeros_like(x)
    keep = rng.keep_mask(seed, x.numel(), 1, p).view(x.shape)
    return (x * (1 / (1 - p))).masked_fill(~keep, 0.0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.fuse_pass_testing.dropout(grad, *ctx.saved_tensors, ctx.p), None, None


# Tagged like every op that draws: not to be folded into a constant, not to be run again in backward.
# Activation checkpointing looks for the device among the keyword arguments.
_LIBRARY.define(
    "seed(*, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag)
)
_LIBRARY.impl("seed", _seed, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fuse_pass_testing::seed", lambda *, device: torch.empty((), dtype=torch.int64, device=device), lib=_LIBRARY
)
_LIBRARY.define("dropout(Tensor x, Tensor seed, float p) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("dropout", _dropped, "CompositeExplicitAutograd")
torch.library.register_fake("fuse_pass_testing::dropout", lambda x, seed, p: torch.empty_like(x), lib=_LIBRARY)
torch.library.register_autograd("fuse_pass_testing::dropout", _backward, setup_context=_setup, lib=_LIBRARY)
compat.never_merge(torch.ops.fuse_pass_testing.seed)


_STOCK = (F.dropout, torch.dropout)


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`F.dropout` with the mask of the seed in force."""
    if not training or p == 0:
        return x
    dropped: Tensor = torch.ops.fuse_pass_testing.dropout(x, torch.ops.fuse_pass_testing.seed(device=x.device), p)
    return x.copy_(dropped) if inplace else dropped


@contextlib.contextmanager
def in_eager() -> Iterator[None]:
    """Eager PyTorch with our dropout; not a `TorchFunctionMode`, because checkpoints would recompute without it."""
    with mock.patch.object(F, "dropout", dropout), mock.patch.object(torch, "dropout", dropout):
        yield


def use_in(module: GraphModule) -> GraphModule:
    """Puts our dropout and our seed in place of all others in a Dynamo graph, fused or not, sub-graphs included."""
    for child in module.modules():
        if isinstance(child, GraphModule):
            for node in child.graph.nodes:
                if node.target in _STOCK:
                    node.target = dropout
                elif node.target is torch.ops.fuse_pass.seed.default:
                    node.target = torch.ops.fuse_pass_testing.seed.default
                    node.args, node.kwargs = (), {"device": node.args[0]}
            child.recompile()
    return module


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[type[_Draws]]:
    """Every mask comes from `seed`; yields what is known of the draws."""
    _Draws.seed, _Draws.any = seed, False
    yield _Draws
