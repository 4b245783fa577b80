"""The bits of numbers by arithmetic: `aten.view.dtype` in ONNX, which has nothing like it before opset 26.

    bits(x) = Σ steps · 2^s + |x| / (2^e · 2^−s)        s fraction bits; `steps` binades above the smallest normal
    x(bits) = (fraction + implicit 1) · 2^(field − …)   sums and products that are all exact

NaN has one pattern. Integers of 32 bits are also read as bytes, lowest first, and bytes as signed and back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_pass.integrations.onnx.rounding import power_below, steps_to
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
    power, binades = power_below(magnitude, lowest, carrier.bias, carrier)
    fraction = magnitude / (power * math.ldexp(1.0, -carrier.sig_bits))
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
    rest = torch.where(is_normal, field - 1, field)
    power = torch.full_like(significand, math.ldexp(1.0, 1 - carrier.bias - carrier.sig_bits))
    for step in steps_to(2 * carrier.bias - 1, carrier):
        taken = rest >= step
        power = torch.where(taken, power * math.ldexp(1.0, step), power)
        rest = torch.where(taken, rest - step, rest)
    special = torch.where(fraction == 0, math.inf, torch.full_like(significand, math.nan))
    value = torch.where(field == 2 * carrier.bias + 1, special, significand * power)
    return torch.where(bits < 0, -value, value)


def right_shift(x: Tensor, places: Any) -> Tensor:
    """`x >> places` for bytes, which torch.onnx (torch 2.13) takes for signed ones; all others are its own affair."""
    if x.dtype is not torch.uint8:
        return NotImplemented
    wide = places.to(torch.int32) if isinstance(places, Tensor) else places
    return (x.to(torch.int32) >> wide).to(torch.uint8)
