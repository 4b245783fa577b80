"""Gradients of quantisation: straight through, and zero where a value was clipped.

    clip_gradient(grad, x, low, high)     grad where low <= x <= high, else 0
    straight_through(x, value)            value, dy/dx = 1; 0 where a `ratio` is given and not within low … high

Both are linear in what they pass on, so gradients of any order exist. All tensors have the shape of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_pass.ops.library import define, define_autograd
from fuse_pass.ops.rounding import compute_carrier


def _clip_body(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    # By sign bits and not by a bool: the partitioner would rather store a bool than x, and storing bools is slow.
    of_x, of_grad = compute_carrier(x.dtype), compute_carrier(grad.dtype)
    wide = x.to(of_x.dtype)
    outside = ((high - wide).view(of_x.int_dtype) | (wide - low).view(of_x.int_dtype)) >> of_x.width
    bits = grad.to(of_grad.dtype).view(of_grad.int_dtype)
    return (bits & ~outside.to(of_grad.int_dtype)).view(of_grad.dtype).to(grad.dtype)


def _setup_clip(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, ctx.low, ctx.high = inputs
    ctx.save_for_backward(x)


def _clip_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.fuse_pass.clip_gradient(grad, *ctx.saved_tensors, ctx.low, ctx.high), None, None, None


clip_gradient = define(
    "clip_gradient",
    "(Tensor grad, Tensor x, float low, float high) -> Tensor",
    _clip_body,
    lambda grad, x, low, high: torch.empty_like(grad),
)
define_autograd(clip_gradient, _setup_clip, _clip_autograd)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ratio, ctx.low, ctx.high = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(ratio)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (ratio,) = ctx.saved_tensors
    grad = grad if ratio is None else clip_gradient(grad, ratio, ctx.low, ctx.high)
    return grad.to(ctx.x_dtype), None, None, None, None


straight_through = define(
    "straight_through",
    "(Tensor x, Tensor value, Tensor? ratio=None, float low=0, float high=0) -> Tensor",
    lambda x, value, ratio=None, low=0.0, high=0.0: value.clone(),
    lambda x, value, ratio=None, low=0.0, high=0.0: torch.empty_like(value),
)
define_autograd(straight_through, _setup, _autograd)
