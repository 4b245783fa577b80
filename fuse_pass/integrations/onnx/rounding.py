"""Rounding by arithmetic, for ONNX, which cannot read the bits of a number before opset 26.

    q = 2^(max(floor(log2 |x|), emin) − sig_bits)        the distance of neighbours around x
    y = round(|x| / q) · q, bounded, with the sign of x

Powers of two are found by comparison, and products and quotients with them are exact: the results are those of
`numerics.rounding`, bit for bit, in every deterministic mode.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from fuse_pass.numerics.formats import FloatFormat
from fuse_pass.numerics.rounding import FLOAT32, FLOAT64, Carrier, Grid
from fuse_pass.ops.fake_quantize import FloatRounding, carrier_of, holds_all, largest

# torch.onnx writes constants of float64 graphs in float32.
_LARGEST_STEP = 64


def power_like(like: Tensor, exponent: int) -> Tensor:
    """`2^exponent`, made of powers that float32 holds."""
    power = torch.ones_like(like)
    while exponent:
        step = max(-_LARGEST_STEP, min(exponent, _LARGEST_STEP))
        power, exponent = power * math.ldexp(1.0, step), exponent - step
    return power


def steps_to(span: int) -> list[int]:
    """Exponents that add up, each taken or left in this order, to any number in 0 … span."""
    if span < 1:
        return []
    first = 1 << (min(span, _LARGEST_STEP).bit_length() - 1)
    smaller = [first >> shift for shift in range(1, first.bit_length())]
    return [first] * -(-(span - (first - 1)) // first) + smaller


def power_below(magnitude: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """`2^e` with e = floor(log2 magnitude), held within lowest … highest, and `e − lowest` as a float."""
    power = power_like(magnitude, lowest)
    count = torch.zeros_like(magnitude)
    for step in steps_to(highest - lowest):
        candidate = power * math.ldexp(1.0, step)
        fits = magnitude >= candidate
        power, count = torch.where(fits, candidate, power), torch.where(fits, count + step, count)
    return power, count


def round_to_integer(ratio: Tensor, negative: Tensor, mode: str) -> Tensor:
    """Of ratio ≥ 0, the magnitude of what is `negative`; deterministic modes."""
    if mode == "nearest":
        return torch.round(ratio)
    below = torch.floor(ratio)
    rest = ratio - below  # exact
    is_odd = below - 2 * torch.floor(below * 0.5) == 1
    goes_up = {
        "towards_zero": lambda: rest < 0,
        "plus_inf": lambda: (rest > 0) & ~negative,
        "minus_inf": lambda: (rest > 0) & negative,
        "nearest_away": lambda: rest >= 0.5,
        "nearest_zero": lambda: rest > 0.5,
        "nearest_odd": lambda: (rest > 0.5) | ((rest == 0.5) & ~is_odd),
        "odd": lambda: (rest > 0) & ~is_odd,
    }[mode]()
    return torch.where(goes_up, below + 1, below)


def round_signed(x: Tensor, mode: str) -> Tensor:
    """x rounded to integers; −0 becomes 0, infinities and NaN stay."""
    if mode == "nearest":
        rounded = torch.round(x)
    else:
        negative = x < 0
        magnitude = round_to_integer(x.abs(), negative, mode)
        magnitude = torch.where(x.abs() < math.inf, magnitude, x.abs())  # of an infinity there is no rest
        rounded = torch.where(negative, -magnitude, magnitude)
    return torch.where(rounded == 0, 0.0, rounded)


def rounded(x: Tensor, how: FloatRounding) -> Tensor:
    """`how.rounded(x)` of a deterministic mode."""
    fmt = how.format
    if holds_all(x.dtype, fmt):
        return x.clone()
    carrier = carrier_of(x.dtype, fmt)
    if carrier is FLOAT64 and (fmt.exp_bits > 8 or fmt.sig_bits > FLOAT32.sig_bits) and torch.compiler.is_exporting():
        raise NotImplementedError(
            f"ONNX export: expected a format of at most 8 exponent and 23 fraction bits, got {fmt.name}: torch.onnx "
            "writes constants in float32"
        )
    wide = x.to(carrier.dtype)
    magnitude, negative = wide.abs(), wide < 0
    y = _on_grid(magnitude, negative, Grid(carrier, fmt.sig_bits, fmt.emin, fmt.subnormal and fmt.signed), fmt, how)
    top = largest(x.dtype, fmt)
    y = _bounded(y, negative, fmt, how, top)
    y = torch.where(magnitude < math.inf, y, _of_infinities(magnitude, fmt, how, top))
    if not fmt.signed:
        y = torch.where(wide > 0, torch.where(y < fmt.smallest_normal, fmt.smallest_normal, y), math.nan)
    below_zero = negative | (wide.reciprocal() < 0) if fmt.has_negative_zero else negative & (y > 0)
    # By a factor: ONNX Runtime's Where loses the sign of a zero.
    return (y * torch.where(below_zero, -1.0, torch.ones_like(y))).to(x.dtype)


def _on_grid(magnitude: Tensor, negative: Tensor, grid: Grid, fmt: FloatFormat, how: FloatRounding) -> Tensor:
    carrier = grid.carrier
    lowest = max(grid.emin, 1 - carrier.bias)
    # One binade above the largest number will do: what lies beyond stays beyond.
    power, _ = power_below(magnitude, lowest, min(fmt.emax + 1, carrier.bias))
    # No finer than the carrier's own subnormals.
    quantum = power * power_like(magnitude, -min(grid.sig_bits, lowest + carrier.bias - 1 + carrier.sig_bits))
    y = round_to_integer(magnitude / quantum, negative, how.rounding) * quantum
    if grid.subnormal:
        return y
    smallest = math.ldexp(1.0, grid.smallest_exponent)
    goes_up = magnitude >= _number(grid.threshold(how.rounding), carrier)
    if how.rounding in ("plus_inf", "minus_inf"):
        goes_up = goes_up & (~negative if how.rounding == "plus_inf" else negative)
    below = torch.where(goes_up, smallest, torch.zeros_like(magnitude))
    return torch.where(magnitude < smallest, below, y)


def _bounded(y: Tensor, negative: Tensor, fmt: FloatFormat, how: FloatRounding, top: float) -> Tensor:
    if how.overflow == "saturate" or how.rounding in ("towards_zero", "odd"):
        return torch.where(y > top, top, y)
    beyond = math.inf if fmt.has_inf else math.nan
    if how.rounding not in ("plus_inf", "minus_inf"):
        return torch.where(y > top, beyond, y)
    inwards = negative if how.rounding == "plus_inf" else ~negative
    return torch.where(y > top, torch.where(inwards, top, torch.full_like(y, beyond)), y)


def _of_infinities(magnitude: Tensor, fmt: FloatFormat, how: FloatRounding, top: float) -> Tensor:
    """What infinity and NaN become."""
    if fmt.has_inf:
        return magnitude
    if how.overflow != "saturate":
        return torch.full_like(magnitude, math.nan)
    return torch.where(magnitude.isnan(), magnitude, top)


def _number(pattern: int, carrier: Carrier) -> float:
    """The number >= 0 of these bits."""
    real, integer = ("<f", "<i") if carrier.dtype is torch.float32 else ("<d", "<q")
    return float(struct.unpack(real, struct.pack(integer, pattern))[0])
