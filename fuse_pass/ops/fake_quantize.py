"""Rounds to the numbers of a floating-point format and stays in the dtype of x.

    y = round(x)        dy/dx = 1, straight through; with `clip_grad` 0 where |x| > format.max

x and y `[...]`, float16, bfloat16, float32 or float64. Half types go through float32, which holds them exactly, float32
through float64 for the few formats with a wider exponent; never through a cast to the format's own dtype, because
Inductor removes pairs of casts (pytorch issue 185337). Infinities that the format has, NaN and the sign of zero
stay. Overflow is judged after rounding with unlimited exponents (IEEE 754-2019 §7.4).

On CPU half types cost more than float32: 0.9 ns an element against 0.2 on one Zen 5 core (torch 2.13). 0.7 of it are
Inductor's two bit casts, which go through memory where kernels read and write half types; 16-bit integers would be
worse (3.8 ns), for it generates no vector code with them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_pass.formats import FloatFormat
from fuse_pass.ops import rounding as core
from fuse_pass.ops.library import define, define_autograd
from fuse_pass.ops.rounding import FLOAT32, FLOAT64, Carrier, Grid
from fuse_pass.ops.straight_through import clip_gradient

OVERFLOWS = ("ieee", "saturate")


def carrier_of(dtype: torch.dtype, fmt: FloatFormat) -> Carrier:
    """What to compute in: float32 unless x is float64 or the format has smaller normal numbers than float32."""
    return FLOAT64 if fmt.emin + FLOAT32.bias < 1 else core.compute_carrier(dtype)


def largest(dtype: torch.dtype, fmt: FloatFormat) -> float:
    """The largest finite number of the format that `dtype` holds."""
    info = torch.finfo(dtype)
    sig_bits = min(fmt.sig_bits, core.fraction_bits(dtype))
    emax = min(fmt.emax, math.frexp(info.max)[1] - 1)
    return min(fmt.max, math.ldexp(2 ** (sig_bits + 1) - 1, emax - sig_bits))


def holds_all(dtype: torch.dtype, fmt: FloatFormat) -> bool:
    """Whether every number of `dtype` is one of the format, so that nothing is left to round."""
    info = torch.finfo(dtype)
    sig_bits, emin = core.fraction_bits(dtype), round(math.log2(info.tiny))
    smallest = fmt.emin - fmt.sig_bits if fmt.subnormal else fmt.emin
    return (
        fmt.has_inf
        and fmt.sig_bits >= sig_bits
        and fmt.max >= info.max
        and (smallest <= emin - sig_bits and (fmt.emin <= emin or fmt.sig_bits >= sig_bits))
    )


def _bound(
    rounded: Tensor, negative: Tensor, fmt: FloatFormat, carrier: Carrier, top: int, rounding: str, overflow: str
) -> Tensor:
    """Replaces what lies beyond the largest number, whose bits are `top`."""
    if overflow == "saturate" or rounding in ("towards_zero", "odd"):
        return rounded.clamp(max=top)
    beyond = carrier.infinity if fmt.has_inf else carrier.nan
    if rounding not in ("plus_inf", "minus_inf"):
        return torch.where(rounded > top, beyond, rounded)
    outwards = ~negative if rounding == "plus_inf" else negative
    return torch.where(rounded > top, top + ((beyond - top) & outwards), rounded)


def round_to_format(
    x: Tensor,
    seed: Tensor | None,
    exp_bits: int,
    sig_bits: int,
    bias: int,
    encoding: str,
    rounding: str,
    subnormal: bool,
    overflow: str,
    clip_grad: bool,
) -> Tensor:
    """The arithmetic of the op `fake_quantize`, with its arguments; no gradient of its own."""
    fmt = FloatFormat(exp_bits, sig_bits, bias=bias, encoding=encoding, subnormal=subnormal)
    if holds_all(x.dtype, fmt):
        return x.clone()
    carrier = carrier_of(x.dtype, fmt)
    bits = x.to(carrier.dtype).view(carrier.int_dtype)
    magnitude = bits & carrier.magnitude_mask
    negative = bits >> carrier.width
    grid = Grid(carrier, sig_bits, fmt.emin, subnormal and fmt.signed)
    random = core.random_like(magnitude, seed) if seed is not None else None
    rounded = core.round_magnitude(magnitude, negative, grid, rounding, random)

    top = carrier.pattern(largest(x.dtype, fmt))
    rounded = _bound(rounded, negative, fmt, carrier, top, rounding, overflow)
    if not fmt.signed:  # neither zero nor negative numbers: what is too small becomes the smallest
        assert grid.smallest is not None
        rounded = rounded.clamp(min=grid.smallest)
        rounded = torch.where(bits <= 0, carrier.nan, rounded)
    if fmt.has_inf or overflow == "saturate":  # infinities stay or, of a format without, become the largest number
        rounded = torch.where(magnitude < carrier.infinity + (not fmt.has_inf), rounded, magnitude)
    else:
        rounded = torch.where(magnitude < carrier.infinity, rounded, carrier.nan)
    sign = bits ^ magnitude
    if not fmt.has_negative_zero:
        sign = sign & (-rounded >> carrier.width)
    return (rounded | sign).view(carrier.dtype).to(x.dtype)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


fake_quantize = define(
    "fake_quantize",
    "(Tensor x, Tensor? seed, int exp_bits, int sig_bits, int bias, str encoding, str rounding, bool subnormal, "
    "str overflow, bool clip_grad) -> Tensor",
    round_to_format,
    _fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, exp_bits, sig_bits, bias, encoding, _, subnormal, _, ctx.clip_grad = inputs
    if ctx.clip_grad:
        ctx.limit = largest(x.dtype, FloatFormat(exp_bits, sig_bits, bias=bias, encoding=encoding, subnormal=subnormal))
        ctx.save_for_backward(x)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.clip_grad:
        grad = clip_gradient(grad, *ctx.saved_tensors, -ctx.limit, ctx.limit)
    return grad, *(None,) * 9


define_autograd(fake_quantize, _setup, _autograd)
