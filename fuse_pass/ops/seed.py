"""The ops that draw a seed: at every call another one, following `torch.manual_seed`, kept for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_pass.inductor import compat, private
from fuse_pass.ops.library import LIBRARY, define


def _draw(*, device: torch.device) -> Tensor:
    return compat.inductor_seed(device)


seed = define(
    "seed",
    # By name alone: there PyTorch's checkpoints look for it, to know whose generator to set back.
    "(*, Device device) -> Tensor",
    body=_draw,
    fake=lambda *, device: torch.empty((), dtype=torch.int64, device=device),
    tags=(torch.Tag.nondeterministic_seeded,),
)


def is_draw(target: Any) -> bool:
    """Whether what a node of a graph calls is `seed`."""
    is_op = isinstance(target, (private.OpOverload, private.OpOverloadPacket))
    return is_op and str(target).removesuffix(".default") == "fuse_pass.seed"


def _take(seed: Tensor, *, device: torch.device) -> Tensor:
    # Inductor removes plain copies, and then their marks.
    return seed.to(device).bitwise_not().bitwise_not()


taken = define(
    "taken_seed",
    "(Tensor seed, *, Device device) -> Tensor",
    body=_take,
    fake=lambda seed, *, device: torch.empty_like(seed, device=device),
)
"""A copy of a seed that is about to be moved on."""

# Inductor keeps draws apart by itself; with other compilers of a training graph all dropouts would share one mask.
compat.never_merge(torch.ops.fuse_pass.seed)
compat.never_merge_seeds_of_inductor()
# Drawn again in backward, or read from what has been moved on since, they would be other masks.
compat.never_recomputed(seed, LIBRARY)
compat.never_recomputed(taken, LIBRARY)
