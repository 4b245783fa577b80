"""What results are like: the dtype in which sums are made, exact quotients, the layout of a gradient, rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fuse_pass.inductor import compat, private


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything narrower is summed in float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """`a / b` as IEEE 754 rounds it, on every device.

    Triton's float32 division is up to 2 ulp off unless Inductor is told otherwise, as `FuseBackend` does for ops with
    `exact_quotients`; its float64 one is exact, and rounded to float32 it is the right float32, for 53 ≥ 2 · 24 + 2.
    """
    if a.device.type == "cpu" or a.dtype is torch.float64 or compat.rounds_quotients():
        return a / b
    return (a.double() / b.double()).to(a.dtype)


def without_nan(x: Tensor) -> Tensor:
    """x, with 0 in the place of NaN."""
    return torch.where(is_nan(x), 0.0, x)


def is_nan(x: Tensor) -> Tensor:
    """As `x.isnan()`, which Inductor writes as a loop over single elements (16 x 3072: a call of 66 us
    instead of 40, of which 30 are no arithmetic; Intel Xeon, AVX-512)."""
    return x != x


def gradient_like(tensor: Tensor) -> Tensor:
    """Uninitialised, with the shape and layout of a gradient of `tensor`."""
    if tensor.dim() == 2 and is_column_major(tensor):
        return tensor.new_empty(tensor.shape[::-1]).t()
    return tensor.new_empty(tensor.shape)


def is_column_major(matrix: Tensor) -> bool:
    strides: list[int | None] = [stride if isinstance(stride, int) else None for stride in matrix.stride()]  # no guards
    return strides[0] == 1 and strides[1] != 1


def rows_of(x: Tensor) -> Tensor:
    """`[..., features] → [rows, features]`; a single vector is one row."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def shaped_like_rows_of(x: Tensor, y: Tensor) -> Tensor:
    """`y [rows, features] → [..., features]`; no view for autograd: users may write into the result of a layer."""
    return private.unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
