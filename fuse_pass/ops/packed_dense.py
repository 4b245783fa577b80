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

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.gemm.product import product
from fuse_pass.inductor import private
from fuse_pass.kernels import few_bits
from fuse_pass.numerics.bit_codes import VARIANTS, activation_codes
from fuse_pass.numerics.tensors import accumulation_dtype, rows_of
from fuse_pass.ops.fused_op import FusedOp, Gradients, register
from fuse_pass.ops.library import cast_for_autocast, define
from fuse_pass.ops.llm_int8 import quantize_rows

WEIGHT_ONLY, INT8, LLM_INT8 = "weight_only", "int8", "llm_int8"
KINDS = (INT8, LLM_INT8, WEIGHT_ONLY, *VARIANTS)

integer_product = define(
    "integer_product",
    "(Tensor a, Tensor words, SymInt columns, int bits) -> Tensor",
    body=few_bits.integer_product,
    fake=lambda a, words, columns, bits: a.new_empty((a.shape[0], columns), dtype=torch.int32),
    decompose=False,
)
float_product = define(
    "float_product",
    "(Tensor x, Tensor words, Tensor table, Tensor scale, Tensor? shift, SymInt columns, int bits) -> Tensor",
    body=few_bits.float_product,
    fake=lambda x, words, table, scale, shift, columns, bits: x.new_empty(x.shape[0], columns),
    decompose=False,
)


def _outlier_product(outliers: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """`outliers [rows, d_in] @ Ŵ.T`, of which few columns, or none, are anything but zeros: only those are multiplied.

    NaN is not zero.
    """
    which = (outliers != 0).any(0).nonzero().squeeze(1)
    if which.numel() == 0:
        return outliers.new_zeros(outliers.shape[0], scale.shape[0])
    codes = few_bits.columns_of_inner(words, which, scale.shape[0])
    weight = (codes.to(outliers.dtype) - _OFFSETS[INT8]) * scale.to(outliers.dtype)
    return outliers[:, which].mm(weight)


outlier_product = define(
    "outlier_product",
    "(Tensor outliers, Tensor words, Tensor scale) -> Tensor",
    body=_outlier_product,
    fake=lambda outliers, words, scale: outliers.new_empty(outliers.shape[0], scale.shape[0]),
    decompose=False,
)

# The integer that code 0 stands for, times -1; b1 has steps of 2.
_OFFSETS = {INT8: 128, LLM_INT8: 128, "b1.58": 1, "b1": 1}


def integer_codes(weight: Tensor, kind: str) -> Tensor:
    """Integers of a kind, as the unsigned codes that are packed."""
    shifted = weight.to(torch.int16) + _OFFSETS[kind]
    return (shifted // 2 if kind == "b1" else shifted).to(torch.uint8)


def integers_of(codes: Tensor, kind: str) -> Tensor:
    """The other way, int16."""
    return codes.to(torch.int16) * (2 if kind == "b1" else 1) - _OFFSETS[kind]


def _integer_sums(a: Tensor, words: Tensor, columns: int, kind: str, bits: int) -> Tensor:
    """`Σ a W̃`, int32 `[rows, columns]`, for int8 a."""
    if a.device.type != "cpu":  # in the open: Inductor unpacks where it multiplies, or into int8 for a library
        codes = few_bits.unpack(words, columns, a.shape[1], bits)
        return product(a, integers_of(codes, kind).to(torch.int8))
    sums: Tensor = integer_product(a, words, columns, bits)
    of_rows = a.sum(1, dtype=torch.int32).unsqueeze(1)
    return sums * 2 - of_rows if kind == "b1" else sums - _OFFSETS[kind] * of_rows


@dataclass(frozen=True)
class PackedDense(FusedOp):
    """x stays wide under autocast; the result is in autocast's dtype."""

    autocast = ("cpu", "cuda")

    x: Tensor
    words: Tensor
    scale: Tensor
    shift: Tensor | None
    table: Tensor | None
    bias: Tensor | None
    kind: str
    bits: int
    columns: int
    threshold: float

    def cast_result(self, y: Tensor, device_type: str) -> Tensor:
        return cast_for_autocast(y, device_type)  # type: ignore[no-any-return]

    def forward(self) -> Tensor:
        x = rows_of(self.x)
        if self.kind == WEIGHT_ONLY:
            y = self._by_weight_only(x.to(accumulation_dtype(x.dtype)))
        elif self.kind in VARIANTS:
            codes, step = activation_codes(x, self.kind)
            sums = _integer_sums(codes.to(torch.int8), self.words, self.columns, self.kind, self.bits)
            wide = accumulation_dtype(torch.promote_types(x.dtype, self.scale.dtype))
            y = sums.to(wide) * step.to(wide) * self.scale
        else:
            y = self._by_int8(x.to(accumulation_dtype(x.dtype)))
        y = y if self.bias is None else y + self.bias
        # No view for autograd: users may write into the result of a layer.
        return private.unsafe_view(y.to(self.x.dtype), (*self.x.shape[:-1], self.columns))

    def _by_int8(self, x: Tensor) -> Tensor:
        outliers = None
        if self.kind == LLM_INT8 and self.threshold > 0:
            is_outlier = (x.abs() > self.threshold).any(0)
            # Selected, not multiplied by 0 and 1: an infinity is an outlier as well, and 0 · inf is NaN.
            outliers, x = torch.where(is_outlier, x, 0.0), torch.where(is_outlier, 0.0, x)
        steps, row_scale = quantize_rows(x)
        sums = _integer_sums(steps, self.words, self.columns, self.kind, self.bits)
        # In this order nothing overflows that does not overflow in the result.
        y = sums.to(x.dtype) * self.scale * row_scale[:, None]
        return y if outliers is None else y + outlier_product(outliers, self.words, self.scale)

    def _by_weight_only(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            return product(x, _real_weight(self, x.shape[1]).to(x.dtype))
        table = _no_table(x) if self.table is None else self.table
        padded = self.words.shape[1] * (32 // self.bits)
        if x.device.type != "cpu":
            arguments = (self.words, table, self.scale, self.shift, self.columns, x.shape[1], self.bits)
            return product(x, few_bits.float_weight(*arguments))
        x = F.pad(x, (0, padded - x.shape[1])) if isinstance(x.shape[1], int) and x.shape[1] < padded else x
        return float_product(x, self.words, table, self.scale, self.shift, self.columns, self.bits)  # type: ignore[no-any-return]

    def shapes(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.columns))


@dataclass(frozen=True)
class PackedDenseGradients(Gradients):
    """Of x in its dtype and of the bias in the accumulation dtype."""

    of = ("x", "bias")

    x: Tensor
    words: Tensor
    scale: Tensor
    shift: Tensor | None
    table: Tensor | None
    kind: str
    bits: int
    columns: int

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        dtype = accumulation_dtype(grad_y.dtype)
        grad, grads = rows_of(grad_y).to(dtype), {}
        if "x" in needed:
            weight = _real_weight(self, self.x.shape[-1]).to(dtype)
            grads["x"] = product(grad, weight.t()).to(self.x.dtype).view(self.x.shape)
        if "bias" in needed:
            grads["bias"] = grad.sum(0)
        return grads

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        return self.backward(needed, grad_y)

    def like(self, name: str, grad_y: Tensor) -> Tensor:
        if name == "bias":
            return grad_y.new_empty(self.columns, dtype=accumulation_dtype(grad_y.dtype))
        return torch.empty_like(self.x, memory_format=torch.contiguous_format)


def _no_table(like: Tensor) -> Tensor:
    """Codes of 8 bits have none."""
    return like.new_zeros(16)


def _real_weight(packed: Any, inner: int) -> Tensor:
    """Ŵ `[d_out, d_in]` of the arguments of either op."""
    settings = (packed.kind, packed.bits, inner, packed.columns)
    return real_weight(packed.words, packed.scale, packed.shift, packed.table, *settings)


def real_weight(
    words: Tensor, scale: Tensor, shift: Tensor | None, table: Tensor | None,
    kind: str, bits: int, inner: int, columns: int,
) -> Tensor:  # fmt: skip
    """Ŵ `[d_out, inner]` in the dtype of the scale: what the packed weight stands for.

    Args:
        words: as `few_bits.pack` packs codes.
        scale: as `PackedDense` has it.
        shift: likewise.
        table: likewise.
        kind: one of `KINDS`.
        bits: of a code.
        inner: d_in.
        columns: d_out.
    """
    if kind == WEIGHT_ONLY:
        table = _no_table(scale) if table is None else table
        return few_bits.float_weight(words, table, scale, shift, columns, inner, bits)
    codes = few_bits.unpack(words, columns, inner, bits)
    return integers_of(codes, kind).to(scale.dtype) * scale.unsqueeze(1)


packed_dense = register("packed_dense", PackedDense, PackedDenseGradients)
