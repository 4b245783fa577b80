"""LLM.int8: a Linear whose product is int8 × int8 → int32, except for columns of x with outliers (2208.07339 §3).

    O = {k : some |a[i, k]| > threshold}                              outlier columns; none where threshold is 0
    y = (a_q W_qᵀ) · s_a · s_W + a[:, O] W[:, O]ᵀ + bias               a = act(x), or x itself
    a_q = round(127 · a / max|a|), s_a = max|a| / 127                 per row of a, over the columns outside O
    W_q = round(127 · W / max|W|), s_W = max|W| / 127                 per row of W, over all columns

Shapes: x `[..., d_in]`, weight `[d_out, d_in]`, scale `[d_out]`, bias `[d_out]`, y `[..., d_out]` in the dtype of x.
The weight is floating point and quantised anew in every call, or int8 with its float32 row scales.

- The scales of W leave no column out, as in bitsandbytes: they can be stored, whatever x is.
- Outlier columns are masked and not gathered, so every shape is static: one graph for all inputs.
- Scales, dequantisation and the product of the outliers are float32 (float64 for float64 x), so that float16 cannot
  overflow in between. The integer product is exact.
- A row of zeros gives the bias. A NaN spoils its row; so does an infinity, unless its column is an outlier.

The gradient is that of the floating-point layer (straight-through): `grad_x = grad_y W`, `grad_W = grad_yᵀ a`, with the
floating-point weight where there is one, else with the dequantised one. Saved for backward are x and the weight; `act`
is recomputed.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.gemm.integers import MAX_EXACT_INT32, QMAX
from fuse_pass.gemm.product import product
from fuse_pass.inductor import private
from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.numerics.tensors import accumulation_dtype, quotient, rows_of, without_nan
from fuse_pass.ops.fused_op import Gradients, WideInputOp, register, under_transforms
from fuse_pass.ops.library import call
from fuse_pass.ops.plain import are_transformed
from fuse_pass.ops.products import int8_product


def checked_threshold(threshold: float) -> float:
    """The threshold itself; TypeError if it is no number, ValueError if it is negative or NaN."""
    if not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold: expected a number ≥ 0, got {threshold!r}")
    if not threshold >= 0:
        raise ValueError(f"threshold: expected a number ≥ 0, got {threshold!r}")
    return threshold


def llm_int8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    threshold: float = 6.0,
    activation: str | None = None,
) -> Tensor:
    """`linear(act(x), weight, bias)` by LLM.int8.

    Args:
        x: `[..., d_in]`, floating point.
        weight: `[d_out, d_in]`, floating point (trainable), or int8 together with `scale`.
        bias: `[d_out]`.
        scale: `[d_out]`, real value of one integer step in each row of an int8 weight.
        threshold: columns of `act(x)` with any magnitude above it are computed in floating point; 0 switches that off.
        activation: name in `ACTIVATIONS` of a parameterless activation of x, recomputed in backward.

    Returns:
        `[..., d_out]` in the dtype of x, under autocast in autocast's.

    Raises:
        RuntimeError: what `torch.nn.functional.linear` raises for such an x.
        ValueError: an int8 weight without `scale` or the reverse; `d_in` above 131071 (the int32 sum may overflow); a
            threshold that is negative or NaN.
        TypeError: a threshold that is no number.
    """
    checked_threshold(threshold)
    if (weight.dtype is torch.int8) != (scale is not None):
        raise ValueError(
            f"llm_int8_linear: expected an int8 weight with its scale or a floating-point weight without one, got "
            f"{weight.dtype} and scale={'None' if scale is None else 'a tensor'}"
        )
    if weight.dim() != 2 or weight.shape[1] > MAX_EXACT_INT32:
        raise ValueError(
            f"llm_int8_linear: expected a weight [d_out, d_in ≤ {MAX_EXACT_INT32}], got {list(weight.shape)}"
        )
    if not (x.dim() > 0 and x.is_floating_point() and x.shape[-1] == weight.shape[1] and x.device == weight.device):
        like = x.dtype if x.is_floating_point() else torch.float32
        F.linear(x, _float_weight(weight, scale).to(like), None if bias is None else bias.to(like))
        raise RuntimeError(
            f"llm_int8_linear: expected a floating-point x [..., {weight.shape[1]}] on the weight's device "
            f"{weight.device}, got {x.dtype} {list(x.shape)} on {x.device}"
        )
    op = _under_transforms if are_transformed(x, weight, bias) else _linear_op
    return op(x, weight, scale, bias, threshold, activation)  # type: ignore[no-any-return]


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`[rows, k] → int8 steps [rows, k], scale [rows]` with `matrix ≈ steps * scale[:, None]`.

    The scale is float32 (float64 for float64). A row of zeros has scale 0; a row with NaN or infinity has zeros as
    steps and that value as scale, which makes NaN of every product.
    """
    wide = matrix.to(accumulation_dtype(matrix.dtype))
    absmax = wide.abs().amax(1) if matrix.shape[1] else wide.new_zeros(matrix.shape[0])
    # 127 · x, and not x / absmax: for half types it is exact, so that ties are ties. Where it would overflow, the row
    # is scaled by a power of two first.
    shift = torch.where(absmax > 2.0**100, 2.0**-20, 1.0)
    unit = torch.where(absmax == 0, 1.0, absmax * shift)
    steps = torch.round(quotient(wide * (QMAX * shift)[:, None], unit[:, None]))
    return without_nan(steps).to(torch.int8), absmax / QMAX


def _float_weight(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight.to(scale.dtype) * scale[:, None]


# --- the layer --------------------------------------------------------------------------------------------------------


def _activate(h: Tensor, activation: str | None) -> Tensor:
    return h if activation is None else ACTIVATIONS[activation].forward(h, (), None)


@dataclass(frozen=True)
class LlmInt8Linear(WideInputOp):
    """x stays wide under autocast, for float16 cannot hold an activation above 65504."""

    exact_quotients = True

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    threshold: float
    activation: str | None

    def forward(self) -> Tensor:
        a = _activate(rows_of(self.x), self.activation)
        a = a.to(accumulation_dtype(a.dtype))
        outliers = None
        if self.threshold > 0:
            is_outlier = (a.abs() > self.threshold).any(0)
            # Selected, not multiplied by 0 and 1: an infinity is an outlier as well, and 0 · inf is NaN.
            outliers, a = torch.where(is_outlier, a, 0.0), torch.where(is_outlier, 0.0, a)
        steps, row_scale = quantize_rows(a)
        weight_steps, weight_scale = quantize_rows(self.weight) if self.scale is None else (self.weight, self.scale)
        # In this order nothing overflows that does not overflow in the result.
        y = call(int8_product, steps, weight_steps).to(a.dtype) * weight_scale * row_scale[:, None]
        if outliers is not None:
            y = y + product(outliers, _float_weight(self.weight, self.scale).to(a.dtype))
        y = y if self.bias is None else y + self.bias
        # No view for autograd: users may write into the result of a layer.
        return private.unsafe_view(y.to(self.x.dtype), (*self.x.shape[:-1], self.weight.shape[0]))

    def shapes(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.weight.shape[0]))


@dataclass(frozen=True)
class LlmInt8LinearGradients(Gradients):
    """Of x, of a floating-point weight, and of the bias in the accumulation dtype."""

    of = ("x", "weight", "bias")

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    activation: str | None

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        grad, h, grads = rows_of(grad_y), rows_of(self.x), {}
        if "x" in needed:
            grad_h = _float_product(grad, _float_weight(self.weight, self.scale).t()).to(self.x.dtype)
            if self.activation is not None:
                grad_h = ACTIVATIONS[self.activation].backward(grad_h, h, (), None)
            grads["x"] = grad_h.view(self.x.shape)
        if "weight" in needed:
            grads["weight"] = _float_product(grad.t(), _activate(h, self.activation).t()).to(self.weight.dtype)
        if "bias" in needed:
            grads["bias"] = grad.sum(0, dtype=accumulation_dtype(grad.dtype))
        return grads

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        """By `torch.func.vjp` of the float layer."""
        dtype = accumulation_dtype(self.x.dtype)

        def formula(x: Tensor, weight: Tensor) -> Tensor:
            return F.linear(_activate(x, self.activation).to(dtype), weight.to(dtype)).to(x.dtype)

        _, vjp = torch.func.vjp(formula, self.x, _float_weight(self.weight, self.scale))  # type: ignore[misc]  # no aux
        of_x, of_weight = vjp(grad_y)
        return {"x": of_x, "weight": of_weight, "bias": rows_of(grad_y).sum(0, dtype=dtype)}

    def like(self, name: str, grad_y: Tensor) -> Tensor:
        if name == "bias":
            return grad_y.new_empty(self.weight.shape[0], dtype=accumulation_dtype(grad_y.dtype))
        return super().like(name)


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return product(a.to(dtype), b.to(dtype))


_linear_op = register("llm_int8_linear", LlmInt8Linear, LlmInt8LinearGradients)
_under_transforms = under_transforms(_linear_op)
