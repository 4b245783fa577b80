"""Rounds to integers times a scale and stays in the dtype of x.

    q = clamp(round(x / scale) + zero_point, quant_min, quant_max)
    y = (q − zero_point) × scale

    dy/dx = 1, straight through; with `clip_grad` 0 where x / scale + zero_point is outside quant_min … quant_max
    dy/dscale = y / scale − x / scale, outside y / scale              learned step size, 1902.08153

x and y `[...]`; scale and zero_point broadcast to x. Computed in float32 (float64 for float64). Integers have no −0.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse_pass.numerics import rounding as core
from fuse_pass.numerics.rounding import Carrier, Grid
from fuse_pass.numerics.tensors import quotient
from fuse_pass.ops.arguments import Seed
from fuse_pass.ops.fused_op import FusedOp, Gradients, register
from fuse_pass.ops.straight_through import clip_gradient

# Processors round to integers by themselves, exactly and in one step (int8 with dynamic scales, 4 M float32 on one
# Zen 5 core: 2.9 copies of the tensor by bit fields, 2.2 so). Upwards and downwards, a subnormal that is taken for 0
# would make a difference.
_INSTRUCTIONS = {"nearest": torch.round, "towards_zero": torch.trunc}


def round_to_multiples(
    x: Tensor, carrier: Carrier, frac_bits: int, rounding: str, seed: Tensor | None = None
) -> Tensor:
    """The multiples of 2**−frac_bits, exactly; x and y in `carrier.dtype`. Infinities and NaN stay, −0 does not."""
    if frac_bits == 0 and rounding in _INSTRUCTIONS:
        integer = _INSTRUCTIONS[rounding](x)
        return torch.where(integer == 0, 0.0, integer)
    bits = x.view(carrier.int_dtype)
    magnitude = bits & carrier.magnitude_mask
    # A floating-point grid so high that all of its fractional numbers are subnormal.
    grid = Grid(carrier, carrier.sig_bits, carrier.sig_bits - frac_bits)
    random = core.random_like(magnitude, seed) if seed is not None else None
    rounded = core.round_magnitude(magnitude, bits >> carrier.width, grid, rounding, random)
    return (rounded | ((bits ^ magnitude) & (-rounded >> carrier.width))).view(carrier.dtype)


@dataclass(frozen=True)
class IntRounding:
    """To which integers, and whether values that are clipped have a gradient."""

    quant_min: int
    quant_max: int
    rounding: str
    clip_grad: bool


@dataclass(frozen=True)
class FakeQuantizeInt(FusedOp):
    exact_quotients = True

    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    seed: Seed | None
    how: IntRounding

    def forward(self) -> Tensor:
        carrier, low, high = core.compute_carrier(self.x.dtype), self.how.quant_min, self.how.quant_max
        step = self.scale.to(carrier.dtype)
        q = round_to_multiples(quotient(self.x.to(carrier.dtype), step), carrier, 0, self.how.rounding, self.seed)
        if self.zero_point is None:
            return (q.clamp(low, high) * step).to(self.x.dtype)
        zero = self.zero_point.to(carrier.dtype)
        return (((q + zero).clamp(low, high) - zero) * step).to(self.x.dtype)

    def shapes(self) -> Tensor:
        return torch.empty_like(self.x)

    def saved(self, results: tuple[Tensor, ...], needed: Set[str]) -> FakeQuantizeIntGradients:
        if self.how.clip_grad or "scale" in needed:
            return FakeQuantizeIntGradients(self.x, self.scale, self.zero_point, self.seed, self.how)
        return FakeQuantizeIntGradients(None, None, None, None, self.how)


@dataclass(frozen=True)
class FakeQuantizeIntGradients(Gradients):
    """x and the rest are there where they are read: by a scale that is learned, or to clip."""

    of = ("x", "scale")

    x: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    seed: Tensor | None
    how: IntRounding

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        if self.x is None or self.scale is None:
            return {"x": grad_y}
        low, high = self.how.quant_min, self.how.quant_max
        wide = core.compute_carrier(self.x.dtype).dtype
        ratio = self.x.to(wide) / self.scale.to(wide)
        position = ratio if self.zero_point is None else ratio + self.zero_point
        grads = {"x": clip_gradient(grad_y, position, low, high) if self.how.clip_grad else grad_y}
        if "scale" in needed:
            how = (low, high, self.how.rounding, False)
            y = fake_quantize_int(self.x, self.scale, self.zero_point, self.seed, *how)
            inside = clip_gradient(ratio, position, low, high)
            grad_scale = grad_y * (y.to(wide) / self.scale.to(wide) - inside)
            grads["scale"] = grad_scale.sum_to_size(self.scale.shape)
        return grads


fake_quantize_int = register("fake_quantize_int", FakeQuantizeInt, FakeQuantizeIntGradients)
