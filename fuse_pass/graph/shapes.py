"""Questions about fake tensors that never add a guard, so that asking cannot cause a recompilation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fuse_pass.inductor import compat, compiler, private

_UNKNOWN_STRIDE = 8192  # one that depends on data: a number as good as any


def value_of(node: Any) -> torch.Tensor | None:
    """The fake tensor that Dynamo, or `torch.export`, recorded for a node; None for sizes, tuples and constants."""
    value = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def is_plain(value: torch.Tensor) -> bool:
    """A strided tensor (or Parameter) of the ordinary class: no subclass, no functorch wrapper, not sparse."""
    return (
        private.is_fake(value)
        and private.is_plain_class(value)
        and (value.layout is torch.strided and not value.is_nested)
    )


def memory_of(value: torch.Tensor) -> int:
    """What tensors that share memory have in common; a torch.func transform writes into what it wraps."""
    while private.is_transformed(value):
        value = private.unwrapped(value)
    return private.address_of(value)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input that the graph is valid for."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return compiler.statically_known_true(a == b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike.

    The stride of a dimension of one element has no meaning, nor has any of a tensor without elements.
    """
    return _same_strides(a.shape, a.stride(), b.stride())


def is_contiguous(value: torch.Tensor) -> bool:
    """Whether a tensor lies in memory as a new one of its shape would."""
    return _same_strides(value.shape, value.stride(), private.contiguous_strides_of(value.shape))


def memory_order(value: torch.Tensor) -> list[int]:
    """The dimensions of a tensor, from the one with the longest steps in memory to the one with the shortest."""

    def step(dim: int) -> int:
        hint = compat.size_hint(value.stride(dim))
        return _UNKNOWN_STRIDE if hint is None else hint

    return sorted(range(value.dim()), key=step, reverse=True)


def is_permuted_contiguous(value: torch.Tensor) -> bool:
    """Whether a tensor lies in memory as a new one would, but for the order of its dimensions."""
    order = memory_order(value)
    shape, strides = [value.shape[dim] for dim in order], [value.stride(dim) for dim in order]
    return _same_strides(shape, strides, private.contiguous_strides_of(shape))


def _same_strides(shape: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> bool:
    if any(same_size(size, 0) for size in shape):
        return True
    return all(same_size(size, 1) or same_size(x, y) for size, x, y in zip(shape, a, b, strict=True))


def keeps_rows(before: torch.Tensor | None, after: torch.Tensor | None) -> bool:
    """Whether a reshape leaves every row (last dimension) as it was."""
    if before is None or after is None or before.dim() == 0 or after.dim() == 0:
        return False
    return same_size(before.shape[-1], after.shape[-1])
