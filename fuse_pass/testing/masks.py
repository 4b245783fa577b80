"""One dropout mask for everybody: eager, compiled and fused models draw theirs from a seed that the tester sets.

The mask of a dropout is a function of the seed, p and the flat index of an element (`random_bits.keep_mask`), so that
any split into rows and columns gives the same, and eager PyTorch becomes an exact reference of a fused dropout.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from fuse_pass.inductor import compat, compiler
from fuse_pass.numerics import random_bits

_LIBRARY = torch.library.Library("fuse_pass_testing", "DEF")


class _Draws:
    """The seed in force, whether something random was asked for, and what happened to PyTorch's generator.

    Backward begins with the generator seeded anew, as a draw that is made again would find it changed in real life.
    A checkpoint sets the generator back for what it computes again.
    """

    seed = 0
    any = False
    moves_generator = False
    in_forward = 0
    _state = torch.empty(0)

    @classmethod
    def watch_generator(cls) -> None:
        cls._state = torch.get_rng_state()

    @classmethod
    def note_whether_moved(cls) -> None:
        cls.moves_generator |= not torch.equal(cls._state, torch.get_rng_state())


def _seed(*, device: torch.device) -> Tensor:
    _Draws.any = True
    return torch.tensor(_Draws.seed, dtype=torch.int64, device=device)


def _fused_seed(*, device: torch.device) -> Tensor:
    """The seed in force; another one where a draw of forward is made again in backward."""
    _Draws.any = True
    again = torch.initial_seed() != _Draws.in_forward
    return torch.tensor(_Draws.seed + (1 << 40 if again else 0), dtype=torch.int64, device=device)


def _dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Keeps the strides of x, as `F.dropout` does."""
    if p == 1:
        return torch.zeros_like(x)
    return random_bits.keep_only(x, random_bits.keep_mask(seed, x.numel(), 1, p), p)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.fuse_pass_testing.dropout(grad, *ctx.saved_tensors, ctx.p), None, None


# Tagged like every op that draws: not to be folded into a constant, not to be run again in backward.
# Activation checkpointing looks for the device among the keyword arguments.
for _name, _body in (("seed", _seed), ("fused_seed", _fused_seed)):
    _LIBRARY.define(
        f"{_name}(*, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag)
    )
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"fuse_pass_testing::{_name}", lambda *, device: torch.empty((), dtype=torch.int64, device=device), lib=_LIBRARY
    )
_LIBRARY.define("dropout(Tensor x, Tensor seed, float p) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("dropout", _dropped, "CompositeExplicitAutograd")
torch.library.register_fake("fuse_pass_testing::dropout", lambda x, seed, p: torch.empty_like(x), lib=_LIBRARY)
torch.library.register_autograd("fuse_pass_testing::dropout", _backward, setup_context=_setup, lib=_LIBRARY)
compat.never_merge(torch.ops.fuse_pass_testing.seed, torch.ops.fuse_pass_testing.fused_seed)


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`F.dropout` with the mask of the seed in force."""
    if not training or p == 0:
        return x
    dropped: Tensor = torch.ops.fuse_pass_testing.dropout(x, torch.ops.fuse_pass_testing.seed(device=x.device), p)
    return x.copy_(dropped) if inplace else dropped


def _uniform(shape: Sequence[int], device: torch.device) -> Tensor:
    """Multiples of 2**-24 from 0 to below 1 in float64: the same numbers in float32."""
    bits = random_bits.random_bits(torch.ops.fuse_pass_testing.seed(device=device), math.prod(shape), 1)
    return (((bits >> 8) & 0xFFFFFF).double() * 2.0**-24).view(tuple(shape))


def _rand(*size: Any, dtype: torch.dtype | None = None, device: Any = "cpu", **others: Any) -> Tensor:
    shape = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    return _uniform(shape, torch.device(device)).to(dtype or torch.get_default_dtype())


def _rand_like(x: Tensor, **others: Any) -> Tensor:
    return _uniform(x.shape, x.device).to(x.dtype)


def _bernoulli(x: Tensor, p: float = 0.5) -> Tensor:
    return x.copy_(_uniform(x.shape, x.device) < p)


def _set_uniform(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return x.copy_(low + (high - low) * _uniform(x.shape, x.device))


def _exponential(x: Tensor, rate: float = 1.0) -> Tensor:
    return x.copy_(-torch.log1p(-_uniform(x.shape, x.device)) / rate)


_attention = F.scaled_dot_product_attention


def _dropped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, written out where it drops something."""
    if dropout_p == 0:
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype is torch.bool else scores + attn_mask
    return dropout(scores.softmax(-1), dropout_p) @ value


# By owner and name, as eager PyTorch looks them up.
_OURS: dict[tuple[Any, str], Callable[..., Tensor]] = {
    (F, "dropout"): dropout,
    (torch, "dropout"): dropout,
    (F, "scaled_dot_product_attention"): _dropped_attention,
    (torch, "rand"): _rand,
    (torch, "rand_like"): _rand_like,
    (Tensor, "bernoulli_"): _bernoulli,
    (Tensor, "uniform_"): _set_uniform,
    (Tensor, "exponential_"): _exponential,
}
# The same as targets of calls in a graph: functions and names of methods.
_TARGETS = {
    **{name if owner is Tensor else getattr(owner, name): ours for (owner, name), ours in _OURS.items()},
    # What an opened `nn.MultiheadAttention` calls.
    torch.ops.aten.scaled_dot_product_attention.default: _dropped_attention,
    torch.ops.aten.dropout.default: dropout,
}


@contextlib.contextmanager
def in_eager() -> Iterator[None]:
    """Eager PyTorch with our dropout; not a `TorchFunctionMode`, because checkpoints would recompute without it."""
    with contextlib.ExitStack() as stack:
        for (owner, name), ours in _OURS.items():
            stack.enter_context(mock.patch.object(owner, name, ours))
        yield


@contextlib.contextmanager
def in_fused() -> Iterator[None]:
    """Fused dropouts draw the tester's seed too: `fuse_pass.seed` stays in the graph, and what it calls is another.

    Where the user asks for eager's random numbers they keep their own seed, and are found out.
    """
    original = compat.inductor_seed

    def drawn(device: torch.device) -> Tensor:
        if compiler.draws_stock_random_numbers({}):
            return original(device)
        seed: Tensor = torch.ops.fuse_pass_testing.fused_seed(device=device)
        return seed

    with mock.patch.object(compat, "inductor_seed", drawn):
        yield


def use_in(module: GraphModule) -> GraphModule:
    """Puts our dropout in place of all that are not fused in a Dynamo graph, sub-graphs included."""
    for child in module.modules():
        if isinstance(child, GraphModule):
            for node in child.graph.nodes:
                if node.op in ("call_function", "call_method") and node.target in _TARGETS:
                    node.op, node.target = "call_function", _TARGETS[node.target]
            child.recompile()
    return module


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[type[_Draws]]:
    """Every mask comes from `seed`; yields what is known of the draws, all of it at the end.

    PyTorch's generator is as it was afterwards.
    """
    before = torch.get_rng_state()
    _Draws.seed, _Draws.any, _Draws.moves_generator, _Draws.in_forward = seed, False, False, torch.initial_seed()
    _Draws.watch_generator()
    try:
        yield _Draws
        _Draws.note_whether_moved()
    finally:
        torch.set_rng_state(before)


def begin_backward() -> None:
    """To be called in `drawn_from` between forward and backward."""
    _Draws.note_whether_moved()
    torch.manual_seed(_Draws.in_forward ^ 1)
    _Draws.watch_generator()
