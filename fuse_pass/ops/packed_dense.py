"""A Linear whose weight is packed into codes of few bits (`kernels.few_bits`); five ways of multiplying by it.

    int8         y = (Σ x̃ W̃) · s_x · s_W + b      x̃ = round(127 x / max|x|), s_x = max|x| / 127     per row of x
    llm_int8     the same, but columns of x with any magnitude above `threshold` are not rounded (2208.07339)
    b1, b1.58    y = (Σ x̃ W̃) · γ/127 · β + b      W̃ of ±1, or of −1, 0 and 1: see `numerics.bit_codes`
    weight_only  y = Σ x Ŵ + b                    Ŵ = scale · table[code] − shift, per group of inputs

Shapes: x `[..., d_in]`, words int32 `[tiles, words, 16]`, scale `[d_out]` (of weight_only `[tiles, groups, 16]`, as is
shift), table `[16]`, bias `[d_out]`, y `[..., d_out]` in the dtype of x.

Sums of integers are exact. Sums of weight_only are float32, for float64 x float64. The gradients are those of
`F.linear(x, Ŵ, bias)`, straight through the rounding of x; the weight has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.gemm.product import product
from fuse_pass.inductor import compat, private
from fuse_pass.kernels import few_bits
from fuse_pass.numerics.bit_codes import VARIANTS, activation_codes
from fuse_pass.numerics.tensors import accumulation_dtype, rows_of
from fuse_pass.ops.arguments import Arguments
from fuse_pass.ops.fused_op import Gradients, WideInputOp, register, under_transforms
from fuse_pass.ops.library import call, define
from fuse_pass.ops.llm_int8 import quantize_rows
from fuse_pass.ops.plain import are_transformed

WEIGHT_ONLY, INT8, LLM_INT8 = "weight_only", "int8", "llm_int8"
KINDS = (INT8, LLM_INT8, WEIGHT_ONLY, *VARIANTS)

# The integer that code 0 stands for, times -1; b1 has steps of 2.
_OFFSETS = {INT8: 128, LLM_INT8: 128, "b1.58": 1, "b1": 1}


def _integer_product_in_aten(a: Tensor, words: Tensor, columns: int, bits: int) -> Tensor:
    codes = few_bits.unpack(words, columns, a.shape[1], bits)
    shift = 128 if bits == 8 else 0  # codes of 8 bits do not fit into int8
    sums = product(a, (codes.to(torch.int16) - shift).to(torch.int8))
    return sums + shift * a.sum(1, dtype=torch.int32).unsqueeze(1)


integer_product = define(
    "integer_product",
    "(Tensor a, Tensor words, SymInt columns, int bits) -> Tensor",
    body=few_bits.integer_product,
    fake=lambda a, words, columns, bits: a.new_empty((a.shape[0], columns), dtype=torch.int32),
    in_aten=_integer_product_in_aten,
)


def _float_product_in_aten(
    x: Tensor, words: Tensor, table: Tensor, scale: Tensor, shift: Tensor | None, columns: int, bits: int
) -> Tensor:
    return product(x, few_bits.float_weight(words, table, scale, shift, columns, x.shape[1], bits))


float_product = define(
    "float_product",
    "(Tensor x, Tensor words, Tensor table, Tensor scale, Tensor? shift, SymInt columns, int bits) -> Tensor",
    body=few_bits.float_product,
    fake=lambda x, words, table, scale, shift, columns, bits: x.new_empty(x.shape[0], columns),
    in_aten=_float_product_in_aten,
)


def _outlier_product(outliers: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """`outliers [rows, d_in] @ Ŵ.T`; few columns, or none, hold anything but zeros (NaN is not 0): only those count."""
    which = (outliers != 0).any(0).nonzero().squeeze(1)
    if which.numel() == 0:
        return outliers.new_zeros(outliers.shape[0], scale.shape[0])
    codes = few_bits.columns_of_inner(words, which, scale.shape[0])
    weight = (codes.to(outliers.dtype) - _OFFSETS[INT8]) * scale.to(outliers.dtype)
    return outliers[:, which].mm(weight)


def _outlier_product_in_aten(outliers: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """The same with all columns: which of them count is not known before the program runs."""
    codes = few_bits.unpack(words, scale.shape[0], outliers.shape[1], 8)
    return product(outliers, (codes.to(outliers.dtype) - _OFFSETS[INT8]) * scale.to(outliers.dtype).unsqueeze(1))


outlier_product = define(
    "outlier_product",
    "(Tensor outliers, Tensor words, Tensor scale) -> Tensor",
    body=_outlier_product,
    fake=lambda outliers, words, scale: outliers.new_empty(outliers.shape[0], scale.shape[0]),
    in_aten=_outlier_product_in_aten,
)


def integer_codes(weight: Tensor, kind: str) -> Tensor:
    """Integers of a kind, as the unsigned codes that are packed."""
    shifted = weight.to(torch.int16) + _OFFSETS[kind]
    return (shifted // 2 if kind == "b1" else shifted).to(torch.uint8)


def integers_of(codes: Tensor, kind: str) -> Tensor:
    """The other way, int16."""
    return codes.to(torch.int16) * (2 if kind == "b1" else 1) - _OFFSETS[kind]


@dataclass(frozen=True)
class PackedWeight(Arguments):
    """Ŵ `[columns, d_in]` as it is kept.

    Attributes:
        words: as `few_bits.pack` packs codes.
        scale: see the top of this file.
        shift: likewise.
        table: likewise; None for codes that are integers.
        kind: one of `KINDS`.
        bits: of a code.
        columns: d_out.
    """

    words: Tensor
    scale: Tensor
    shift: Tensor | None
    table: Tensor | None
    kind: str
    bits: int
    columns: int

    def real(self, inner: int) -> Tensor:
        """Ŵ for d_in = `inner`, in the dtype of the scale."""
        if self.kind == WEIGHT_ONLY:
            return few_bits.float_weight(*self.looked_up(), self.columns, inner, self.bits)
        codes = few_bits.unpack(self.words, self.columns, inner, self.bits)
        return integers_of(codes, self.kind).to(self.scale.dtype) * self.scale.unsqueeze(1)

    def looked_up(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Words, table, scale and shift, as the float products take them: codes of 8 bits read no table."""
        table = self.scale.new_zeros(16) if self.table is None else self.table
        return self.words, table, self.scale, self.shift

    def integer_sums(self, a: Tensor) -> Tensor:
        """`Σ a W̃`, int32 `[rows, columns]`, for int8 a."""
        if a.device.type != "cpu":  # in the open: Inductor unpacks where it multiplies, or into int8 for a library
            codes = few_bits.unpack(self.words, self.columns, a.shape[1], self.bits)
            return product(a, integers_of(codes, self.kind).to(torch.int8))
        sums: Tensor = call(integer_product, a, self.words, self.columns, self.bits)
        of_rows = a.sum(1, dtype=torch.int32).unsqueeze(1)
        return sums * 2 - of_rows if self.kind == "b1" else sums - _OFFSETS[self.kind] * of_rows

    def float_sums(self, x: Tensor) -> Tensor:
        """`Σ x Ŵ`, `[rows, columns]`, for float32 or float64 x."""
        if x.dtype is torch.float64 or x.device.type != "cpu":
            return product(x, self.real(x.shape[1]).to(x.dtype))
        missing = self.words.shape[1] * (32 // self.bits) - x.shape[1]  # of the last group of inputs
        x = F.pad(x, (0, missing)) if missing else x
        return call(float_product, x, *self.looked_up(), self.columns, self.bits)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PackedDense(WideInputOp):
    x: Tensor
    weight: PackedWeight
    bias: Tensor | None
    threshold: float

    def forward(self) -> Tensor:
        x, weight = rows_of(self.x), self.weight
        if weight.kind == WEIGHT_ONLY:
            y = weight.float_sums(x.to(accumulation_dtype(x.dtype)))
            return self._result(y)
        # Read for the largest element of a row, and to be rounded: an activation before would be computed for each.
        x = compat.stored_once(x)
        if weight.kind in VARIANTS:
            codes, step = activation_codes(x, weight.kind)
            wide = accumulation_dtype(torch.promote_types(x.dtype, weight.scale.dtype))
            y = weight.integer_sums(codes.to(torch.int8)).to(wide) * step.to(wide) * weight.scale
        else:
            y = self._by_int8(x.to(accumulation_dtype(x.dtype)))
        return self._result(y)

    def _result(self, y: Tensor) -> Tensor:
        y = y if self.bias is None else y + self.bias
        # No view for autograd: users may write into the result of a layer.
        return private.unsafe_view(y.to(self.x.dtype), (*self.x.shape[:-1], self.weight.columns))

    def _by_int8(self, x: Tensor) -> Tensor:
        weight, outliers = self.weight, None
        if weight.kind == LLM_INT8 and self.threshold > 0:
            is_outlier = (x.abs() > self.threshold).any(0)
            # Selected, not multiplied by 0 and 1: an infinity is an outlier as well, and 0 · inf is NaN.
            outliers, x = torch.where(is_outlier, x, 0.0), torch.where(is_outlier, 0.0, x)
        steps, row_scale = quantize_rows(x)
        # In this order nothing overflows that does not overflow in the result.
        y = weight.integer_sums(steps).to(x.dtype) * weight.scale * row_scale[:, None]
        return y if outliers is None else y + call(outlier_product, outliers, weight.words, weight.scale)

    def shapes(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.weight.columns))


class RealWeight(Protocol):
    """A packed weight of any op: what its codes stand for."""

    @property
    def columns(self) -> int: ...

    def real(self, inner: int) -> Tensor:
        """`[columns, inner]`."""


class StraightThroughGradients(Gradients):
    """Those of `F.linear(x, Ŵ, bias)`: of x in its dtype, and of the bias in the accumulation dtype."""

    of = ("x", "bias")

    x: Tensor
    weight: RealWeight

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        return self._gradients(needed, grad_y, product)

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        return self._gradients(needed, grad_y, lambda grad, b: grad @ b.t())

    def _gradients(
        self, needed: Set[str], grad_y: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        dtype = accumulation_dtype(grad_y.dtype)
        grad, grads = rows_of(grad_y).to(dtype), {}
        if "x" in needed:
            weight = self.weight.real(self.x.shape[-1]).to(dtype)
            grads["x"] = self.passed(multiply(grad, weight.t())).to(self.x.dtype).view(self.x.shape)
        if "bias" in needed:
            grads["bias"] = grad.sum(0)
        return grads

    def passed(self, grad_x: Tensor) -> Tensor:
        """What of the gradient `[rows, d_in]` passes the rounding of x; all of it, unless x is clipped."""
        return grad_x

    def like(self, name: str, grad_y: Tensor) -> Tensor:
        if name == "bias":
            return grad_y.new_empty(self.weight.columns, dtype=accumulation_dtype(grad_y.dtype))
        return torch.empty_like(self.x, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class PackedDenseGradients(StraightThroughGradients):
    x: Tensor
    weight: PackedWeight


packed_dense_op = register("packed_dense", PackedDense, PackedDenseGradients)
_under_transforms = under_transforms(packed_dense_op)


def packed_dense(x: Tensor, weight: Sequence[Any], bias: Tensor | None, threshold: float) -> Tensor:
    """The op, also inside of `torch.func` transforms.

    Args:
        x: `[..., d_in]`, floating point.
        weight: the arguments of a `PackedWeight`.
        bias: `[d_out]`.
        threshold: of "llm_int8".
    """
    op = _under_transforms if are_transformed(x, bias) else packed_dense_op
    return op(x, *weight, bias, threshold)  # type: ignore[no-any-return]
