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
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse_pass.numerics import rounding as core
from fuse_pass.numerics.formats import FloatFormat
from fuse_pass.numerics.rounding import FLOAT32, FLOAT64, Carrier, Grid
from fuse_pass.ops.arguments import Seed
from fuse_pass.ops.fused_op import FusedOp, Gradients, register
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


@dataclass(frozen=True)
class FloatRounding:
    """How values are rounded to a floating-point format; see `formats.FloatFormat` and `rounding.ROUNDINGS`."""

    exp_bits: int
    sig_bits: int
    bias: int
    encoding: str
    rounding: str
    subnormal: bool
    overflow: str

    @property
    def format(self) -> FloatFormat:
        return FloatFormat(
            self.exp_bits, self.sig_bits, bias=self.bias, encoding=self.encoding, subnormal=self.subnormal
        )

    def rounded(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """The arithmetic of the op `fake_quantize`; no gradient of its own."""
        fmt = self.format
        if holds_all(x.dtype, fmt):
            return x.clone()
        carrier = carrier_of(x.dtype, fmt)
        bits = x.to(carrier.dtype).view(carrier.int_dtype)
        magnitude = bits & carrier.magnitude_mask
        negative = bits >> carrier.width
        grid = Grid(carrier, fmt.sig_bits, fmt.emin, fmt.subnormal and fmt.signed)
        random = core.random_like(magnitude, seed) if seed is not None else None
        rounded = core.round_magnitude(magnitude, negative, grid, self.rounding, random)
        rounded = self._bounded(rounded, negative, fmt, carrier, carrier.pattern(largest(x.dtype, fmt)))
        if not fmt.signed:  # neither zero nor negative numbers: what is too small becomes the smallest
            assert grid.smallest is not None
            rounded = rounded.clamp(min=grid.smallest)
            rounded = torch.where(bits <= 0, carrier.nan, rounded)
        if fmt.has_inf or self.overflow == "saturate":  # infinities stay, or in a format without become its largest
            rounded = torch.where(magnitude < carrier.infinity + (not fmt.has_inf), rounded, magnitude)
        else:
            rounded = torch.where(magnitude < carrier.infinity, rounded, carrier.nan)
        sign = bits ^ magnitude
        if not fmt.has_negative_zero:
            sign = sign & (-rounded >> carrier.width)
        return (rounded | sign).view(carrier.dtype).to(x.dtype)

    def _bounded(self, rounded: Tensor, negative: Tensor, fmt: FloatFormat, carrier: Carrier, top: int) -> Tensor:
        """Replaces what lies beyond the largest number, whose bits are `top`."""
        if self.overflow == "saturate" or self.rounding in ("towards_zero", "odd"):
            return rounded.clamp(max=top)
        beyond = carrier.infinity if fmt.has_inf else carrier.nan
        if self.rounding not in ("plus_inf", "minus_inf"):
            return torch.where(rounded > top, beyond, rounded)
        outwards = ~negative if self.rounding == "plus_inf" else negative
        return torch.where(rounded > top, top + ((beyond - top) & outwards), rounded)


@dataclass(frozen=True)
class FakeQuantize(FusedOp):
    x: Tensor
    seed: Seed | None
    how: FloatRounding
    clip_grad: bool

    def forward(self) -> Tensor:
        return self.how.rounded(self.x, self.seed)

    def shapes(self) -> Tensor:
        return torch.empty_like(self.x)

    def saved(self, results: tuple[Tensor, ...], needed: Set[str]) -> FakeQuantizeGradients:
        limit = largest(self.x.dtype, self.how.format) if self.clip_grad else math.inf
        return FakeQuantizeGradients(self.x if self.clip_grad else None, limit)


@dataclass(frozen=True)
class FakeQuantizeGradients(Gradients):
    of = ("x",)

    x: Tensor | None
    limit: float

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        return {"x": grad_y if self.x is None else clip_gradient(grad_y, self.x, -self.limit, self.limit)}


fake_quantize = register("fake_quantize", FakeQuantize, FakeQuantizeGradients)
