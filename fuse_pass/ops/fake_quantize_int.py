"""Rounds to integers times a scale and stays in the dtype of x.

    q = clamp(round(x / scale) + zero_point, quant_min, quant_max)
    y = (q − zero_point) × scale

    dy/dx = 1, straight through; with `clip_grad` 0 where x / scale + zero_point is outside quant_min … quant_max
    dy/dscale = y / scale − x / scale, outside y / scale              learned step size, 1902.08153

x and y `[...]`; scale and zero_point broadcast to x. Computed in float32 (float64 for float64). Integers have no −0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_pass.ops import rounding as core
from fuse_pass.ops.library import define, define_autograd
from fuse_pass.ops.rounding import Carrier, Grid
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


def _body(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    quant_min: int,
    quant_max: int,
    rounding: str,
    clip_grad: bool,
) -> Tensor:
    carrier = core.compute_carrier(x.dtype)
    step = scale.to(carrier.dtype)
    q = round_to_multiples(x.to(carrier.dtype) / step, carrier, 0, rounding, seed)
    if zero_point is None:
        return (q.clamp(quant_min, quant_max) * step).to(x.dtype)
    zero = zero_point.to(carrier.dtype)
    return (((q + zero).clamp(quant_min, quant_max) - zero) * step).to(x.dtype)


fake_quantize_int = define(
    "fake_quantize_int",
    "(Tensor x, Tensor scale, Tensor? zero_point, Tensor? seed, int quant_min, int quant_max, str rounding, "
    "bool clip_grad) -> Tensor",
    _body,
    lambda x, *_: torch.empty_like(x),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, seed, ctx.quant_min, ctx.quant_max, ctx.rounding, ctx.clip_grad = inputs
    if ctx.clip_grad or ctx.needs_input_grad[1]:
        ctx.save_for_backward(x, scale, zero_point, seed)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not (ctx.clip_grad or ctx.needs_input_grad[1]):
        return grad, *(None,) * 7
    x, scale, zero_point, seed = ctx.saved_tensors
    wide = core.compute_carrier(x.dtype).dtype
    ratio = x.to(wide) / scale.to(wide)
    position = ratio if zero_point is None else ratio + zero_point
    grad_x = clip_gradient(grad, position, ctx.quant_min, ctx.quant_max) if ctx.clip_grad else grad
    grad_scale = None
    if ctx.needs_input_grad[1]:
        y = torch.ops.fuse_pass.fake_quantize_int(
            x, scale, zero_point, seed, ctx.quant_min, ctx.quant_max, ctx.rounding, False
        )
        inside = clip_gradient(ratio, position, ctx.quant_min, ctx.quant_max)
        grad_scale = (grad * (y.to(wide) / scale.to(wide) - inside)).sum_to_size(scale.shape).to(scale.dtype)
    return grad_x, grad_scale, *(None,) * 6


define_autograd(fake_quantize_int, _setup, _autograd)
