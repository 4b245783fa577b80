"""A Linear between integers: what a simulated one computes, by sums of the integers themselves.

    a = clamp(round(x / s_x) + z_x)                        int8
    y = (Σ (a − z_x) (c − z_W)) · s_W · s_x + b            c the codes of the weight, z_W and s_W per row of it

Shapes: x `[..., d_in]`, x_scale and x_zero `[]` or one for every row of x, words int32 `[tiles, words, 16]` (see
`kernels.few_bits`), scale float `[d_out]`, zero and sums int32 `[d_out]` (sums = Σ (c − z_W) over d_in),
bias `[d_out]`, y `[..., d_out]` in the dtype of x.

The sums are exact in int32 where d_in is at most `max_inner`; so y is the simulated one up to the rounding of sums. A
NaN spoils its row, and no other. The gradients are those of `F.linear(x, Ŵ, bias)`, straight through the rounding of x,
or 0 where x is clipped; the weight and the scales have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuse_pass.gemm.product import product
from fuse_pass.inductor import private
from fuse_pass.kernels import few_bits
from fuse_pass.numerics import rounding as core
from fuse_pass.numerics.tensors import accumulation_dtype, is_nan, quotient, rows_of, without_nan
from fuse_pass.ops.arguments import Arguments
from fuse_pass.ops.fake_quantize_int import round_to_multiples
from fuse_pass.ops.fused_op import WideInputOp, register, under_transforms
from fuse_pass.ops.library import call
from fuse_pass.ops.packed_dense import StraightThroughGradients, integer_product
from fuse_pass.ops.plain import are_transformed
from fuse_pass.ops.straight_through import clip_gradient


def max_inner(bits: int, *, has_zero_point: bool) -> int:
    """The largest d_in whose sums stay in int32, for codes of so many bits and for x with a zero point or without."""
    largest: int = (2**31 - 1) // ((2**bits - 1) * (255 if has_zero_point else 128))
    return largest


@dataclass(frozen=True)
class IntegerWeight(Arguments):
    """Ŵ = (c − zero) · scale, `[columns, d_in]`, as it is kept; see the top of this file."""

    words: Tensor
    scale: Tensor
    zero: Tensor
    sums: Tensor
    bits: int
    columns: int

    def codes(self, inner: int) -> Tensor:
        return few_bits.unpack(self.words, self.columns, inner, self.bits)

    def real(self, inner: int) -> Tensor:
        """In the dtype of the scale."""
        return (self.codes(inner).to(self.scale.dtype) - self.zero.unsqueeze(1)) * self.scale.unsqueeze(1)

    def centred_sums(self, a: Tensor) -> Tensor:
        """`Σ a (c − z_W)`, int32 `[rows, columns]`, for int8 a."""
        of_rows = a.sum(1, dtype=torch.int32).unsqueeze(1)
        if a.device.type == "cpu":
            sums: Tensor = call(integer_product, a, self.words, self.columns, self.bits)
            return sums - of_rows * self.zero
        # In the open, where Inductor and the device's library see it; codes of 8 bits do not fit into int8.
        shift = 128 if self.bits == 8 else 0
        shifted = (self.codes(a.shape[1]).to(torch.int16) - shift).to(torch.int8)
        return product(a, shifted) - of_rows * (self.zero - shift)


@dataclass(frozen=True)
class InputRounding:
    """How x becomes integers."""

    quant_min: int
    quant_max: int
    rounding: str
    clip_grad: bool

    def integers(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The integers of x, in the dtype in which they are computed; NaN stays. Scale and zero broadcast to x."""
        carrier = core.compute_carrier(x.dtype)
        step = scale.to(carrier.dtype)
        q = round_to_multiples(quotient(x.to(carrier.dtype), step), carrier, 0, self.rounding)
        return (q if zero is None else q + zero.to(carrier.dtype)).clamp(self.quant_min, self.quant_max)

    def passed(self, grad_x: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What of a gradient passes the rounding of x: all of it, or what is not clipped."""
        if not self.clip_grad:
            return grad_x
        wide = core.compute_carrier(x.dtype).dtype
        position = x.to(wide) / scale.to(wide)
        position = position if zero is None else position + zero
        inside: Tensor = clip_gradient(grad_x, position, self.quant_min, self.quant_max)
        return inside


@dataclass(frozen=True)
class QuantizedDense(WideInputOp):
    exact_quotients = True

    x: Tensor
    x_scale: Tensor
    x_zero: Tensor | None
    weight: IntegerWeight
    bias: Tensor | None
    how: InputRounding

    def forward(self) -> Tensor:
        x, weight = rows_of(self.x), self.weight
        scale = self.x_scale.reshape(-1, 1)
        zero = None if self.x_zero is None else self.x_zero.reshape(-1, 1)
        q = self.how.integers(x, scale, zero)
        is_spoiled = is_nan(q).any(1, keepdim=True)
        sums = weight.centred_sums(without_nan(q).to(torch.int8))
        if zero is not None:
            # The zero point of a spoiled row may be NaN.
            sums = sums - without_nan(zero).to(torch.int32) * weight.sums
        wide = accumulation_dtype(torch.promote_types(x.dtype, weight.scale.dtype))
        # In this order nothing overflows that does not overflow in the result.
        y = torch.where(is_spoiled, math.nan, sums.to(wide) * weight.scale * scale.to(q.dtype))
        y = y if self.bias is None else y + self.bias
        # No view for autograd: users may write into the result of a layer.
        return private.unsafe_view(y.to(self.x.dtype), (*self.x.shape[:-1], weight.columns))

    def shapes(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.weight.columns))


@dataclass(frozen=True)
class QuantizedDenseGradients(StraightThroughGradients):
    x: Tensor
    x_scale: Tensor
    x_zero: Tensor | None
    weight: IntegerWeight
    how: InputRounding

    def passed(self, grad_x: Tensor) -> Tensor:
        zero = None if self.x_zero is None else self.x_zero.reshape(-1, 1)
        return self.how.passed(grad_x, rows_of(self.x), self.x_scale.reshape(-1, 1), zero)


quantized_dense_op = register("quantized_dense", QuantizedDense, QuantizedDenseGradients)
_under_transforms = under_transforms(quantized_dense_op)


def quantized_dense(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    weight: Sequence[Any],
    bias: Tensor | None,
    how: Sequence[Any],
) -> Tensor:
    """The op, also inside of `torch.func` transforms.

    Args:
        x: `[..., d_in]`, floating point.
        x_scale: see the top of this file.
        x_zero: likewise; None for symmetric integers.
        weight: the arguments of an `IntegerWeight`.
        bias: `[d_out]`.
        how: the arguments of an `InputRounding`.
    """
    op = _under_transforms if are_transformed(x, bias) else quantized_dense_op
    return op(x, x_scale, x_zero, *weight, bias, *how)  # type: ignore[no-any-return]
