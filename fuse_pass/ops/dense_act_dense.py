"""Linear → activation → [dropout] → Linear as one op: `y = dropout(act(x W1ᵀ + b1)) W2ᵀ + b2`.

Shapes: x `[..., d_in]`, weight1 `[d_hidden, d_in]`, weight2 `[d_out, d_hidden]`, y `[..., d_out]`,
h `[rows, d_hidden]`.

Saved for backward are x, the pre-activation h and the seed; `act(h)` and the dropout mask are recomputed. Three ops:

- `dense_act_dense` for training returns `(y, h)`;
- `dense_act_dense_inference` returns y and may run the activation inside the first product;
- `act_dense` is the second half alone, for chains in which a Linear ends one match and begins the next.

With quantised operands, `hidden_format` rounds h before the activation, `result_format` what the activation gives, and
`act_format` what the second product reads, after dropout; see `packed_format`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.ops import rng
from fuse_pass.ops.activations import ACTIVATIONS
from fuse_pass.ops.dense import (
    gradient_like,
    product,
    product_with_activation,
    rows_of,
    shaped_like_rows_of,
    weight_gradient,
)
from fuse_pass.ops.library import (
    accumulation_dtype,
    autocast_as_products,
    define,
    define_autograd,
    differentiable_grads,
    only_needed,
    placeholders,
)
from fuse_pass.ops.packed_format import quantize_packed, straight_through_packed

_TAIL_SCHEMA = (
    "Tensor weight2, Tensor? bias2, Tensor? act_weight, Tensor? seed, float p, str activation, float[] act_arguments, "
    "int[] hidden_format=[], int[] act_format=[], int[] result_format=[]"
)
_SCHEMA = f"(Tensor x, Tensor weight1, Tensor? bias1, {_TAIL_SCHEMA})"


def _activate(
    h: Tensor,
    act_weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    arguments: Any,
    hidden_format: Sequence[int],
    act_format: Sequence[int],
    result_format: Sequence[int],
    quantize: Callable[[Tensor, Sequence[int]], Tensor] = quantize_packed,
) -> Tensor:
    a = ACTIVATIONS[activation].forward(quantize(h, hidden_format), arguments, act_weight)
    return quantize(rng.dropout(quantize(a, result_format), seed, p), act_format)


def _forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act_weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    act_arguments: list[float],
    hidden_format: Sequence[int] = (),
    act_format: Sequence[int] = (),
    result_format: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    h = product(rows_of(x), weight1, bias1)
    a = _activate(h, act_weight, seed, p, activation, act_arguments, hidden_format, act_format, result_format)
    y = product(a, weight2, bias2)
    return shaped_like_rows_of(x, y), h


def _forward_inference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act_weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    act_arguments: list[float],
    hidden_format: Sequence[int] = (),
    act_format: Sequence[int] = (),
    result_format: Sequence[int] = (),
    prepack: bool = False,
) -> Tensor:
    if hidden_format:  # something stands between the product and the activation
        tail = (act_weight, seed, p, activation, act_arguments, hidden_format, act_format, result_format)
        return _forward(x, weight1, bias1, weight2, bias2, *tail)[0]
    a = product_with_activation(rows_of(x), weight1, bias1, activation, act_arguments, act_weight, prepack=prepack)
    a = quantize_packed(rng.dropout(quantize_packed(a, result_format), seed, p), act_format)
    return shaped_like_rows_of(x, product(a, weight2, bias2, prepack=prepack))


def _tail_forward(
    h: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    act_weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    act_arguments: list[float],
    hidden_format: Sequence[int] = (),
    act_format: Sequence[int] = (),
    result_format: Sequence[int] = (),
) -> Tensor:
    a = _activate(rows_of(h), act_weight, seed, p, activation, act_arguments, hidden_format, act_format, result_format)
    return shaped_like_rows_of(h, product(a, weight2, bias2))


def _tail_backward(
    grad_y: Tensor,
    h: Tensor,
    weight2: Tensor,
    act_weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    act_arguments: list[float],
    output_mask: list[bool],
    hidden_format: Sequence[int] = (),
    act_format: Sequence[int] = (),
    result_format: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, weight2, bias2 and act_weight; an empty tensor where `output_mask` is False."""
    need_h, need_weight2, need_bias2, need_act_weight = output_mask
    grad, h2d = rows_of(grad_y), rows_of(h)
    grad_h, grad_weight2, grad_bias2, grad_act_weight = placeholders(h, 4)
    if need_weight2:
        a = _activate(h2d, act_weight, seed, p, activation, act_arguments, hidden_format, act_format, result_format)
        grad_weight2 = weight_gradient(grad, a, weight2)
    if need_h or need_act_weight:
        grad_a = rng.dropout(product(grad, weight2.t()), seed, p)
        seen = quantize_packed(h2d, hidden_format)  # by the activation; the quantisation itself is straight through
        if need_h:
            grad_h = ACTIVATIONS[activation].backward(grad_a, seen, act_arguments, act_weight).view(h.shape)
        if need_act_weight:
            assert act_weight is not None
            grad_act_weight = _prelu_weight_grad(grad_a, seen, act_weight)
    if need_bias2:  # last, in the kernel of what follows the product; before it, it would be one of its own
        grad_bias2 = grad.sum(0)
    return grad_h, grad_weight2, grad_bias2, grad_act_weight


def _prelu_weight_grad(grad_a: Tensor, h: Tensor, act_weight: Tensor) -> Tensor:
    wide = accumulation_dtype(h.dtype)
    slope_grad = torch.where(h > 0, 0.0, grad_a.to(wide) * h.to(wide))
    summed = slope_grad.sum() if act_weight.numel() == 1 else slope_grad.sum(0)
    return summed.to(act_weight.dtype).view(act_weight.shape)


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    h: Tensor,
    act_weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    act_arguments: list[float],
    output_mask: list[bool],
    hidden_format: Sequence[int] = (),
    act_format: Sequence[int] = (),
    result_format: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1, weight2, bias2 and act_weight; an empty tensor where `output_mask` is False."""
    need_x, need_weight1, need_bias1, need_weight2, need_bias2, need_act_weight = output_mask
    need_h = need_x or need_weight1 or need_bias1
    tail = (h, weight2, act_weight, seed, p, activation, act_arguments)
    formats = (hidden_format, act_format, result_format)
    grad_h, _, grad_bias2, grad_act_weight = _tail_backward(
        grad_y, *tail, [need_h, False, need_bias2, need_act_weight], *formats
    )
    grad_x, grad_weight1, grad_bias1 = placeholders(h, 3)
    # Before any product that can wait: Inductor compiles all that stands between two products as one kernel.
    if need_bias1:
        grad_bias1 = grad_h.sum(0)
    _, grad_weight2, _, _ = _tail_backward(grad_y, *tail, [False, need_weight2, False, False], *formats)
    if need_x:
        grad_x = product(grad_h, weight1.t()).view(x.shape)
    if need_weight1:
        grad_weight1 = weight_gradient(grad_h, rows_of(x), weight1)
    return grad_x, grad_weight1, grad_bias1, grad_weight2, grad_bias2, grad_act_weight


def output_shape(x: Tensor, weight2: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], weight2.shape[0])


def number_of_rows(x: Tensor) -> int:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


def _fake(x: Tensor, weight1: Tensor, bias1: Any, weight2: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(output_shape(x, weight2)), x.new_empty(number_of_rows(x), weight1.shape[0])


def fake_gradients(of: tuple[Tensor | None, ...], output_mask: list[bool]) -> tuple[Tensor, ...]:
    empty = next(t for t in of if t is not None)
    return tuple(
        gradient_like(t) if needed and t is not None else empty.new_empty(0)
        for t, needed in zip(of, output_mask, strict=True)
    )


def bias_of(weight: Tensor) -> Tensor:
    """A tensor of the shape of a bias; not a column, for there may be none."""
    return weight.new_empty(weight.shape[0])


def _fake_tail_backward(
    grad_y: Tensor,
    h: Tensor,
    weight2: Tensor,
    act_weight: Any,
    seed: Any,
    p: Any,
    act: Any,
    arguments: Any,
    mask: list[bool],
    *formats: Any,
) -> tuple[Tensor, ...]:
    return fake_gradients((h, weight2, bias_of(weight2), act_weight), mask)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    h: Tensor,
    act_weight: Any,
    seed: Any,
    p: Any,
    act: Any,
    arguments: Any,
    mask: list[bool],
    *formats: Any,
) -> tuple[Tensor, ...]:
    return fake_gradients((x, weight1, bias_of(weight1), weight2, bias_of(weight2), act_weight), mask)


dense_act_dense = define("dense_act_dense", f"{_SCHEMA} -> (Tensor y, Tensor h)", _forward, _fake)
dense_act_dense_inference = define(
    "dense_act_dense_inference",
    f"(Tensor x, Tensor weight1, Tensor? bias1, {_TAIL_SCHEMA}, bool prepack=False) -> Tensor",
    _forward_inference,
    lambda *arguments: _fake(*arguments)[0],
)
act_dense = define(
    "act_dense",
    f"(Tensor h, {_TAIL_SCHEMA}) -> Tensor",
    _tail_forward,
    lambda h, weight2, *rest: h.new_empty(output_shape(h, weight2)),
)
dense_act_dense_backward = define(
    "dense_act_dense_backward",
    "(Tensor grad_y, Tensor x, Tensor weight1, Tensor weight2, Tensor h, Tensor? act_weight, Tensor? seed, float p, "
    "str activation, float[] act_arguments, bool[6] output_mask, int[] hidden_format=[], int[] act_format=[], "
    "int[] result_format=[]) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
act_dense_backward = define(
    "act_dense_backward",
    "(Tensor grad_y, Tensor h, Tensor weight2, Tensor? act_weight, Tensor? seed, float p, str activation, "
    "float[] act_arguments, bool[4] output_mask, int[] hidden_format=[], "
    "int[] act_format=[], int[] result_format=[]) -> (Tensor, Tensor, Tensor, Tensor)",
    _tail_backward,
    _fake_tail_backward,
)


# The tensor arguments that carry gradients, by position, in the order in which the backward ops return them.
_DIFFERENTIABLE = (0, 1, 2, 3, 4, 5)
_TAIL_DIFFERENTIABLE = (0, 1, 2, 3)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.settings, ctx.formats = inputs[:7], inputs[7:10], inputs[10:]
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, grad_h: Any) -> tuple[Tensor | None, ...]:
    *tensors, h = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    if grad_y is None:
        return (None,) * len(ctx.needs_input_grad)
    if torch.is_grad_enabled():
        grads = differentiable_grads(_formula, tensors, (*ctx.settings, *ctx.formats), needed, grad_y)
    else:
        x, weight1, _, weight2, _, act_weight, seed = tensors
        grads = torch.ops.fuse_pass.dense_act_dense_backward(
            grad_y, x, weight1, weight2, h, act_weight, seed, *ctx.settings, needed, *ctx.formats
        )
    return only_needed(grads, needed, len(ctx.needs_input_grad))


def _tail_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.settings, ctx.formats = inputs[:5], inputs[5:8], inputs[8:]
    ctx.save_for_backward(*tensors)


def _tail_autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in _TAIL_DIFFERENTIABLE]
    if torch.is_grad_enabled():
        grads = differentiable_grads(_tail_formula, tensors, (*ctx.settings, *ctx.formats), needed, grad_y)
    else:
        h, weight2, _, act_weight, seed = tensors
        grads = torch.ops.fuse_pass.act_dense_backward(
            grad_y, h, weight2, act_weight, seed, *ctx.settings, needed, *ctx.formats
        )
    return only_needed(grads, needed, len(ctx.needs_input_grad))


def _tail_formula(
    h: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    act_weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    act_arguments: list[float],
    hidden_format: Sequence[int] = (),
    act_format: Sequence[int] = (),
    result_format: Sequence[int] = (),
) -> Tensor:
    """`act_dense` in differentiable PyTorch, for second derivatives."""
    a = _activate(
        rows_of(h), act_weight, seed, p, activation, act_arguments, hidden_format, act_format, result_format,
        straight_through_packed,
    )  # fmt: skip
    return F.linear(a, weight2, bias2).view(output_shape(h, weight2))


def _formula(x: Tensor, weight1: Tensor, bias1: Tensor | None, *tail: Any) -> Tensor:
    """`dense_act_dense` in differentiable PyTorch, for second derivatives."""
    return _tail_formula(F.linear(x, weight1, bias1), *tail)


define_autograd(dense_act_dense, _setup, _autograd)
define_autograd(act_dense, _tail_setup, _tail_autograd)
autocast_as_products(dense_act_dense, dense_act_dense_inference, act_dense)
