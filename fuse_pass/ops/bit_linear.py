"""A Linear on binary or ternary weights and 8-bit activations: `y = (W̃ x̃) β γ / Q + bias`; see `bit_codes`.

Shapes: x `[..., in]`, weight `[out, in]`, packed `[out, packed_width]`, scale (β) and threshold `[groups]`,
bias `[out]`, y `[..., out]` in `out_dtype` (None: the dtype of x; autocast sets its own).

The product of the integers is exact; half types are computed in float32. The gradient is straight-through as in the
papers' own code: that of `F.linear(x̂, Ŵ, bias)` with dx̂/dx = dŴ/dW = 1, the scales taken as part of x̂ and Ŵ:

    dx = dy Ŵ        dW = dyᵀ x̂        dbias = Σ dy

Saved for backward are x, W, the threshold and β; the integers are recomputed. Of a packed weight nothing but itself is
saved, and it has no gradient.
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
from fuse_pass.numerics.bit_codes import (
    activation_codes,
    dequantized_activations,
    dequantized_weight,
    per_row,
    unpack_codes,
    weight_codes,
    weight_statistics,
)
from fuse_pass.numerics.tensors import accumulation_dtype, rows_of
from fuse_pass.ops.arguments import Size
from fuse_pass.ops.fused_op import FusedOp, Gradients, register, under_transforms
from fuse_pass.ops.library import call
from fuse_pass.ops.products import int8_product
from fuse_pass.ops.straight_through import straight_through


def _integer_product(x_codes: Tensor, codes: Tensor) -> Tensor:
    """`[rows, in] @ int8 [out, in].T → int32 [rows, out]`, exact: int32 holds 16 million terms of ±Q."""
    if codes.device.type != "cpu":  # in the open: Inductor may put what follows into the same kernel
        return product(x_codes.to(torch.int8), codes)
    if codes.shape[1] == 1:  # torch 2.13's int8 product on a CPU reads past a second factor `[1, out]`
        return x_codes.to(torch.int32) * codes.t().to(torch.int32)
    return call(int8_product, x_codes.to(torch.int8), codes)  # type: ignore[no-any-return]


def _apply_codes(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, variant: str, out_dtype: torch.dtype | None
) -> Tensor:
    """The layer for weights that are integers already; the packed and the unpacked forward end here."""
    wide = accumulation_dtype(torch.promote_types(x.dtype, scale.dtype))
    x_codes, step = activation_codes(rows_of(x), variant)
    sums = _integer_product(x_codes, codes)
    y = sums.to(wide) * step.to(wide) * per_row(scale, codes.shape[0])
    if bias is not None:
        y = y + bias
    # No view for autograd: users may write into the result of a layer.
    return private.unsafe_view(y.to(out_dtype or x.dtype), (*x.shape[:-1], y.shape[-1]))


@dataclass(frozen=True)
class _BitLinearOp(FusedOp):
    """Neither x nor W is narrowed by autocast before it is quantised; only the result is in autocast's dtype."""

    autocast = ("cpu", "cuda")
    exact_quotients = True

    def under_autocast(self, device_type: str) -> Any:
        x: Tensor = self.named()["x"]
        is_narrowed = x.dtype is not torch.float64 and x.device.type == device_type
        return self.replaced({"out_dtype": torch.get_autocast_dtype(device_type)}) if is_narrowed else self


@dataclass(frozen=True)
class BitLinear(_BitLinearOp):
    results = ("y", "threshold", "scale")

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    groups: int
    variant: str
    out_dtype: torch.dtype | None

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        threshold, scale = weight_statistics(self.weight, self.groups, self.variant)
        codes = weight_codes(self.weight, threshold, self.variant)
        return _apply_codes(self.x, codes, scale, self.bias, self.variant, self.out_dtype), threshold, scale

    def shapes(self) -> tuple[Tensor, Tensor, Tensor]:
        threshold = self.weight.new_empty(self.groups, dtype=accumulation_dtype(self.weight.dtype))
        y = _like_y(self.x, self.weight.shape[0], self.out_dtype)
        return y, threshold, self.weight.new_empty(self.groups)


@dataclass(frozen=True)
class BitLinearGradients(Gradients):
    """In the dtype of the products, `_dtype_of_products`."""

    of = ("x", "weight", "bias")
    is_under_autocast = True

    x: Tensor
    weight: Tensor
    threshold: Tensor
    scale: Tensor
    variant: str

    def _dtype(self, grad_y: Tensor) -> torch.dtype:
        return _dtype_of_products(grad_y, torch.promote_types(self.x.dtype, self.weight.dtype))

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        grad, grads = rows_of(grad_y).to(self._dtype(grad_y)), {}
        if "x" in needed:
            codes = weight_codes(self.weight, self.threshold, self.variant)
            grads["x"] = _input_gradient(grad, codes, self.scale).view(self.x.shape)
        if "weight" in needed:
            x_hat = dequantized_activations(rows_of(self.x), self.variant).to(grad.dtype)
            grads["weight"] = product(grad.t(), x_hat.t())
        if "bias" in needed:
            grads["bias"] = grad.sum(0)
        return grads

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        """Straight through x̂ and Ŵ once more."""
        with torch.autocast(grad_y.device.type, enabled=False):
            dtype = self._dtype(grad_y)
            grad = rows_of(grad_y).to(dtype)
            x_hat = straight_through_activations(rows_of(self.x).to(dtype), self.variant)
            w_hat = straight_through_weight(self.weight, self.scale.shape[0], self.variant).to(dtype)
            return {"x": (grad @ w_hat).view(self.x.shape), "weight": grad.t() @ x_hat, "bias": grad.sum(0)}

    def like(self, name: str, grad_y: Tensor) -> Tensor:
        shape = {"x": self.x.shape, "weight": self.weight.shape, "bias": self.weight.shape[:1]}[name]
        return self.x.new_empty(shape, dtype=self._dtype(grad_y))


@dataclass(frozen=True)
class BitLinearPacked(_BitLinearOp):
    x: Tensor
    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    variant: str
    out_dtype: torch.dtype | None

    def forward(self) -> Tensor:
        codes = unpack_codes(self.packed, self.x.shape[-1], self.variant)
        return _apply_codes(self.x, codes, self.scale, self.bias, self.variant, self.out_dtype)

    def shapes(self) -> Tensor:
        return _like_y(self.x, self.packed.shape[0], self.out_dtype)

    def saved(self, results: tuple[Tensor, ...], needed: Set[str]) -> BitLinearPackedGradients:
        return BitLinearPackedGradients(self.packed, self.scale, self.x.shape[-1], self.variant)


@dataclass(frozen=True)
class BitLinearPackedGradients(Gradients):
    """In the dtype of the products, `_dtype_of_products`."""

    of = ("x", "bias")
    is_under_autocast = True

    packed: Tensor
    scale: Tensor
    in_features: Size
    variant: str

    def _rows(self, grad_y: Tensor) -> Tensor:
        return rows_of(grad_y).to(_dtype_of_products(grad_y, torch.promote_types(grad_y.dtype, self.scale.dtype)))

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        grad, grads = self._rows(grad_y), {}
        if "x" in needed:
            codes = unpack_codes(self.packed, self.in_features, self.variant)
            of_x = _input_gradient(grad, codes, self.scale)
            grads["x"] = of_x.view(*grad_y.shape[:-1], self.in_features)
        if "bias" in needed:
            grads["bias"] = grad.sum(0)
        return grads

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        codes = unpack_codes(self.packed, self.in_features, self.variant)
        with torch.autocast(grad_y.device.type, enabled=False):
            grad = self._rows(grad_y)
            of_x = (grad * per_row(self.scale, codes.shape[0])) @ codes.to(grad.dtype)
            return {"x": of_x.view(*grad_y.shape[:-1], self.in_features), "bias": grad.sum(0)}

    def like(self, name: str, grad_y: Tensor) -> Tensor:
        shape = (*grad_y.shape[:-1], self.in_features) if name == "x" else self.packed.shape[:1]
        return grad_y.new_empty(shape, dtype=self._rows(grad_y).dtype)


def _like_y(x: Tensor, out_features: int, out_dtype: torch.dtype | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


def _dtype_of_products(grad_y: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of those in backward, for operands of this dtype: on a CPU the accumulation dtype, on a GPU that of dy.

    A GPU sums products of half types in float32 by itself, and is many times slower at those of float32.
    """
    return accumulation_dtype(dtype) if grad_y.device.type == "cpu" else grad_y.dtype


def _input_gradient(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """`dy Ŵ` for dy `[rows, out]`."""
    if grad.dtype in (torch.float16, torch.bfloat16):  # where Ŵ is exact, and dy times β is not
        return product(grad, (codes.to(grad.dtype) * per_row(scale, codes.shape[0])[:, None].to(grad.dtype)).t())
    return product(grad * per_row(scale, codes.shape[0]), codes.t().to(grad.dtype))


_straight_through = under_transforms(straight_through)  # layers run this under torch.func, where their own op cannot


def straight_through_weight(weight: Tensor, groups: int, variant: str) -> Tensor:
    """Ŵ with dŴ/dW = 1."""
    return _straight_through(weight, dequantized_weight(weight.detach(), groups, variant), None, 0.0, 0.0)  # type: ignore[no-any-return]


def straight_through_activations(x: Tensor, variant: str) -> Tensor:
    """x̂ `[..., in]` with dx̂/dx = 1."""
    quantized = dequantized_activations(rows_of(x.detach()), variant).view(x.shape)
    return _straight_through(x, quantized.to(x.dtype), None, 0.0, 0.0)  # type: ignore[no-any-return]


def bit_linear_formula(x: Tensor, weight: Tensor, bias: Tensor | None, variant: str) -> Tensor:
    """The layer in plain PyTorch, for an Ŵ from wherever: what the ops compute up to rounding, differentiable."""
    return F.linear(straight_through_activations(x, variant), weight, bias)


bit_linear = register("bit_linear", BitLinear, BitLinearGradients)
bit_linear_packed = register("bit_linear_packed", BitLinearPacked, BitLinearPackedGradients)
