"""Gradients of quantisation: straight through, and zero where a value was clipped.

    clip_gradient(grad, x, low, high)     grad where low <= x <= high, else 0
    straight_through(x, value)            value, dy/dx = 1; 0 where a `ratio` is given and not within low … high

Both are linear in what they pass on, so gradients of any order exist. All tensors have the shape of x.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse_pass.numerics.rounding import compute_carrier
from fuse_pass.ops.fused_op import FusedOp, Gradients, register


@dataclass(frozen=True)
class ClipGradient(FusedOp):
    grad: Tensor
    x: Tensor
    low: float
    high: float

    def forward(self) -> Tensor:
        # By sign bits and not by a bool: the partitioner would rather store a bool than x, and storing bools is slow.
        of_x, of_grad = compute_carrier(self.x.dtype), compute_carrier(self.grad.dtype)
        wide = self.x.to(of_x.dtype)
        outside = ((self.high - wide).view(of_x.int_dtype) | (wide - self.low).view(of_x.int_dtype)) >> of_x.width
        bits = self.grad.to(of_grad.dtype).view(of_grad.int_dtype)
        return (bits & ~outside.to(of_grad.int_dtype)).view(of_grad.dtype).to(self.grad.dtype)

    def shapes(self) -> Tensor:
        return torch.empty_like(self.grad)


@dataclass(frozen=True)
class ClipGradientGradients(Gradients):
    of = ("grad",)

    x: Tensor
    low: float
    high: float

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        return {"grad": clip_gradient(grad_y, self.x, self.low, self.high)}


@dataclass(frozen=True)
class StraightThrough(FusedOp):
    x: Tensor
    value: Tensor
    ratio: Tensor | None = None
    low: float = 0
    high: float = 0

    def forward(self) -> Tensor:
        return self.value.clone()

    def shapes(self) -> Tensor:
        return torch.empty_like(self.value)


@dataclass(frozen=True)
class StraightThroughGradients(Gradients):
    of = ("x",)

    ratio: Tensor | None
    low: float
    high: float

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        return {"x": grad_y if self.ratio is None else clip_gradient(grad_y, self.ratio, self.low, self.high)}


clip_gradient = register("clip_gradient", ClipGradient, ClipGradientGradients)
straight_through = register("straight_through", StraightThrough, StraightThroughGradients)
