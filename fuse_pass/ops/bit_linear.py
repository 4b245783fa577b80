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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.inductor import private
from fuse_pass.ops.bit_codes import (
    activation_codes,
    dequantised_activations,
    dequantised_weight,
    per_row,
    unpack_codes,
    weight_codes,
    weight_statistics,
)
from fuse_pass.ops.dense import product, rows_of
from fuse_pass.ops.library import accumulation_dtype, define, define_autocast, define_autograd, placeholders


def _integer_product(x_codes: Tensor, codes: Tensor) -> Tensor:
    """`[rows, in] @ int8 [out, in].T → int32 [rows, out]`, exact: int32 holds 16 million terms of ±Q."""
    if codes.shape[1] == 1:  # torch 2.13's int8 product on a CPU reads past a second factor `[1, out]`
        return x_codes.to(torch.int32) * codes.t().to(torch.int32)
    return torch.ops.fuse_pass.int8_product(x_codes.to(torch.int8), codes)  # type: ignore[no-any-return]


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


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, variant: str, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    threshold, scale = weight_statistics(weight, groups, variant)
    y = _apply_codes(x, weight_codes(weight, threshold, variant), scale, bias, variant, out_dtype)
    return y, threshold, scale


def _forward_packed(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, variant: str, out_dtype: torch.dtype | None
) -> Tensor:
    return _apply_codes(x, unpack_codes(packed, x.shape[-1], variant), scale, bias, variant, out_dtype)


def _input_gradient(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """`dy Ŵ` for dy `[rows, out]`."""
    return product(grad * per_row(scale, codes.shape[0]), codes.t().to(grad.dtype))


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    scale: Tensor,
    variant: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias in the accumulation dtype; an empty tensor where `output_mask` is False."""
    need_x, need_weight, need_bias = output_mask
    grad = rows_of(grad_y).to(accumulation_dtype(torch.promote_types(x.dtype, weight.dtype)))
    grad_x, grad_weight, grad_bias = placeholders(grad, 3)
    if need_x:
        grad_x = _input_gradient(grad, weight_codes(weight, threshold, variant), scale).view(x.shape)
    if need_weight:
        grad_weight = product(grad.t(), dequantised_activations(rows_of(x), variant).to(grad.dtype).t())
    if need_bias:
        grad_bias = grad.sum(0)
    return grad_x, grad_weight, grad_bias


def _backward_packed(
    grad_y: Tensor, packed: Tensor, scale: Tensor, in_features: int, variant: str, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias, as `_backward`."""
    need_x, need_bias = output_mask
    grad = rows_of(grad_y).to(accumulation_dtype(torch.promote_types(grad_y.dtype, scale.dtype)))
    grad_x, grad_bias = placeholders(grad, 2)
    if need_x:
        grad_x = _input_gradient(grad, unpack_codes(packed, in_features, variant), scale)
        grad_x = grad_x.view(*grad_y.shape[:-1], in_features)
    if need_bias:
        grad_bias = grad.sum(0)
    return grad_x, grad_bias


def _fake_y(x: Tensor, out_features: int, out_dtype: torch.dtype | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


def _fake(
    x: Tensor, weight: Tensor, bias: Any, groups: int, variant: Any, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    threshold = weight.new_empty(groups, dtype=accumulation_dtype(weight.dtype))
    return _fake_y(x, weight.shape[0], out_dtype), threshold, weight.new_empty(groups)


def _fake_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, threshold: Any, scale: Any, variant: Any, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    wide = accumulation_dtype(torch.promote_types(x.dtype, weight.dtype))
    return tuple(
        x.new_empty(shape if needed else 0, dtype=wide)
        for shape, needed in zip((x.shape, weight.shape, weight.shape[:1]), output_mask, strict=True)
    )


def _fake_backward_packed(
    grad_y: Tensor, packed: Tensor, scale: Tensor, in_features: int, variant: Any, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    wide = accumulation_dtype(torch.promote_types(grad_y.dtype, scale.dtype))
    shapes = ((*grad_y.shape[:-1], in_features), packed.shape[:1])
    return tuple(
        grad_y.new_empty(shape if needed else 0, dtype=wide) for shape, needed in zip(shapes, output_mask, strict=True)
    )


bit_linear = define(
    "bit_linear",
    "(Tensor x, Tensor weight, Tensor? bias, int groups, str variant, ScalarType? out_dtype) "
    "-> (Tensor y, Tensor threshold, Tensor scale)",
    _forward,
    _fake,
)
bit_linear_backward = define(
    "bit_linear_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor threshold, Tensor scale, str variant, bool[3] output_mask) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
bit_linear_packed = define(
    "bit_linear_packed",
    "(Tensor x, Tensor packed, Tensor scale, Tensor? bias, str variant, ScalarType? out_dtype) -> Tensor",
    _forward_packed,
    lambda x, packed, scale, bias, variant, out_dtype: _fake_y(x, packed.shape[0], out_dtype),
)
bit_linear_packed_backward = define(
    "bit_linear_packed_backward",
    "(Tensor grad_y, Tensor packed, Tensor scale, SymInt in_features, str variant, bool[2] output_mask) "
    "-> (Tensor, Tensor)",
    _backward_packed,
    _fake_backward_packed,
)


class _StraightThrough(torch.autograd.Function):
    """The value of one tensor with the gradient of another, in every transform of torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, quantised: Tensor) -> Tensor:
        return quantised.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is needed for backward."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # torch's takes *args
        return grad, None


def straight_through_weight(weight: Tensor, groups: int, variant: str) -> Tensor:
    """Ŵ with dŴ/dW = 1."""
    return _StraightThrough.apply(weight, dequantised_weight(weight.detach(), groups, variant))  # type: ignore[no-any-return]


def straight_through_activations(x: Tensor, variant: str) -> Tensor:
    """x̂ `[..., in]` with dx̂/dx = 1."""
    quantised = dequantised_activations(rows_of(x.detach()), variant).view(x.shape)
    return _StraightThrough.apply(x, quantised.to(x.dtype))  # type: ignore[no-any-return]


def bit_linear_formula(x: Tensor, weight: Tensor, bias: Tensor | None, variant: str) -> Tensor:
    """The layer in plain PyTorch, for an Ŵ from wherever: what the ops compute up to rounding, differentiable."""
    return F.linear(straight_through_activations(x, variant), weight, bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.groups, ctx.variant, _ = inputs
    _, threshold, scale = output
    ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
    ctx.save_for_backward(x, weight, threshold, scale)
    ctx.mark_non_differentiable(threshold, scale)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, *statistics: Any) -> tuple[Tensor | None, ...]:
    x, weight, threshold, scale = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if grad_y is None:
        return (None,) * 6
    if torch.is_grad_enabled():
        grads = _differentiable_grads(ctx, grad_y, x, weight)
    else:
        grads = torch.ops.fuse_pass.bit_linear_backward(grad_y, x, weight, threshold, scale, ctx.variant, list(needed))
    return (*_only_needed(grads, needed, ctx.dtypes), None, None, None)


def _differentiable_grads(ctx: Any, grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that can be differentiated again (`create_graph=True`), straight through x̂ and Ŵ once more."""
    wide = accumulation_dtype(torch.promote_types(x.dtype, weight.dtype))
    with torch.autocast(grad_y.device.type, enabled=False):
        grad = rows_of(grad_y).to(wide)
        x_hat = straight_through_activations(rows_of(x).to(wide), ctx.variant)
        w_hat = straight_through_weight(weight, ctx.groups, ctx.variant).to(wide)
        return (grad @ w_hat).view(x.shape), grad.t() @ x_hat, grad.sum(0)


def _only_needed(grads: Any, needed: Any, dtypes: Any) -> list[Tensor | None]:
    return [grad.to(dtype) if need else None for grad, need, dtype in zip(grads, needed, dtypes, strict=True)]


def _packed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, bias, ctx.variant, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.dtypes = [None if t is None else t.dtype for t in (x, bias)]
    ctx.save_for_backward(packed, scale)


def _packed_autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale = ctx.saved_tensors
    needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[3])
    if torch.is_grad_enabled():
        codes = unpack_codes(packed, ctx.in_features, ctx.variant)
        with torch.autocast(grad_y.device.type, enabled=False):
            grad = rows_of(grad_y).to(accumulation_dtype(torch.promote_types(grad_y.dtype, scale.dtype)))
            grad_x = (grad * per_row(scale, codes.shape[0])) @ codes.to(grad.dtype)
            grads = (grad_x.view(*grad_y.shape[:-1], ctx.in_features), grad.sum(0))
    else:
        grads = torch.ops.fuse_pass.bit_linear_packed_backward(
            grad_y, packed, scale, ctx.in_features, ctx.variant, list(needed)
        )
    of_x, of_bias = _only_needed(grads, needed, ctx.dtypes)
    return of_x, None, None, of_bias, None, None


def _autocast_rule(device_type: str) -> Any:
    """Neither x nor W is narrowed before it is quantised; only the result is in autocast's dtype."""

    def rule(op: Any, x: Tensor, *rest: Any) -> Any:
        narrowed = x.dtype is not torch.float64 and x.device.type == device_type
        return op(x, *rest[:-1], torch.get_autocast_dtype(device_type) if narrowed else rest[-1])

    return rule


define_autograd(bit_linear, _setup, _autograd)
define_autograd(bit_linear_packed, _packed_setup, _packed_autograd)
for _device_type in ("cpu", "cuda"):
    for _op in (bit_linear, bit_linear_packed):
        define_autocast(_op, _device_type, _autocast_rule(_device_type))
    for _op in (bit_linear_backward, bit_linear_packed_backward):
        define_autocast(_op, _device_type, lambda op, *arguments: op(*arguments))  # no cast in what it is made of
