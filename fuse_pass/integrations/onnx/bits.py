"""The bits of numbers by arithmetic: `aten.view.dtype` in ONNX, which has nothing like it before opset 26.

    bits(x) = Σ steps · 2^s + |x| / (2^e · 2^−s)        s fraction bits; `steps` binades above the smallest normal
    x(bits) = (fraction + implicit 1) · 2^(field − …)   sums and products that are all exact

NaN has one pattern. Integers of 32 bits are also read as bytes, lowest first, and bytes as signed and back. Beside
that, what torch.onnx or ONNX Runtime reads otherwise than PyTorch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuse_pass.integrations.onnx.rounding import power_below, power_like
from fuse_pass.numerics.rounding import FLOAT32, FLOAT64, Carrier


def view_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.view(dtype)`.

    Raises:
        NotImplementedError: two dtypes between which the package makes no views.
    """
    if x.dtype is dtype:
        return x.clone()
    for carrier in (FLOAT32, FLOAT64):
        if (x.dtype, dtype) == (carrier.dtype, carrier.int_dtype):
            return bits_of(x, carrier)
        if (x.dtype, dtype) == (carrier.int_dtype, carrier.dtype):
            return number_of(x, carrier)
    if (x.dtype, dtype) == (torch.uint8, torch.int8):
        wide = x.to(torch.int32)
        return torch.where(wide > 127, wide - 256, wide).to(torch.int8)
    if (x.dtype, dtype) == (torch.int8, torch.uint8):
        return (x.to(torch.int32) & 255).to(torch.uint8)
    if (x.dtype, dtype) == (torch.int32, torch.uint8):
        octets = [(x >> shift) & 255 for shift in (0, 8, 16, 24)]
        return torch.stack(octets, -1).flatten(-2).to(torch.uint8)
    raise NotImplementedError(
        f"ONNX export: expected a view between floats and integers of one width, got {x.dtype} as {dtype}"
    )


def bits_of(x: Tensor, carrier: Carrier) -> Tensor:
    """The bits of floats as integers."""
    magnitude, lowest = x.abs(), 1 - carrier.bias
    power, binades = power_below(magnitude, lowest, carrier.bias)
    fraction = magnitude / (power * power_like(magnitude, -carrier.sig_bits))
    is_finite = magnitude < math.inf
    bits = (binades.to(carrier.int_dtype) << carrier.sig_bits) + torch.where(is_finite, fraction, 0.0).to(
        carrier.int_dtype
    )
    beyond = torch.where(x.isnan(), carrier.nan, torch.full_like(bits, carrier.infinity))
    bits = torch.where(is_finite, bits, beyond)
    # −0 is not below 0, but its reciprocal is.
    negative = torch.where(x == 0, x.reciprocal(), x) < 0
    return torch.where(negative, bits | -(1 << carrier.width), bits)


def number_of(bits: Tensor, carrier: Carrier) -> Tensor:
    """The floats of these bits."""
    fraction, field = bits & ((1 << carrier.sig_bits) - 1), (bits >> carrier.sig_bits) & (2 * carrier.bias + 1)
    is_normal = field > 0
    significand = torch.where(is_normal, fraction + (1 << carrier.sig_bits), fraction).to(carrier.dtype)
    # Of constants alone: a table in the file, and not steps that are taken in every run.
    power = _powers(carrier)[torch.where(is_normal, field - 1, field).to(torch.int64)]
    special = torch.where(fraction == 0, math.inf, torch.full_like(significand, math.nan))
    value = torch.where(field == 2 * carrier.bias + 1, special, significand * power)
    return value * torch.where(bits < 0, -1.0, torch.ones_like(value))  # and not −value: 0 keeps its sign


def _powers(carrier: Carrier) -> Tensor:
    """`2^(k + 1 − bias − sig_bits)` for k = 0 … 2 · bias: the distance of neighbours with the exponent field k + 1."""
    exponents = torch.arange(2 * carrier.bias + 1, dtype=torch.float64) + (1 - carrier.bias - carrier.sig_bits)
    return torch.pow(torch.full_like(exponents, 2.0), exponents).to(carrier.dtype)


def right_shift(x: Tensor, places: Any) -> Any:
    """`x >> places` for bytes, which torch.onnx (torch 2.13) takes for signed ones; all others are its own affair."""
    if x.dtype is not torch.uint8:
        return NotImplemented
    wide = places.to(torch.int32) if isinstance(places, Tensor) else places
    return torch.bitwise_right_shift(x.to(torch.int32), wide).to(torch.uint8)


def index(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """`x[indices]` for indices of 32 bits, which ONNX's GatherND does not take; others are torch.onnx's affair."""
    if not any(part is not None and part.dtype is torch.int32 for part in indices):
        return NotImplemented
    wide = [part.to(torch.int64) if part is not None and part.dtype is torch.int32 else part for part in indices]
    return torch.ops.aten.index.Tensor(x, wide)


def amax(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    """The largest element, NaN where there is one: ONNX Runtime's ReduceMax looks past it."""
    return _with_nan(torch.ops.aten.amax.default, x, dim, keepdim)


def amin(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    """The smallest likewise."""
    return _with_nan(torch.ops.aten.amin.default, x, dim, keepdim)


_INSIDE = threading.local()


def _with_nan(reduce: Any, x: Tensor, dim: Sequence[int], keepdim: bool) -> Any:
    if not x.is_floating_point() or getattr(_INSIDE, "reduces", False):
        return NotImplemented  # as it is
    _INSIDE.reduces = True
    try:
        found = reduce(x, dim, keepdim)
        spoiled = torch.ops.aten.amax.default(x.isnan().to(torch.int32), dim, keepdim)
    finally:
        _INSIDE.reduces = False
    return torch.where(spoiled > 0, math.nan, found)
