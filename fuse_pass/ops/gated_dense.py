"""A gated feed-forward block as one op: `y = dropout(act(x Wgᵀ + bg) ⊙ (x Wuᵀ + bu)) W2ᵀ + b2`.

GLU with sigmoid, ReGLU, GEGLU and SwiGLU of Shazeer, "GLU Variants Improve Transformer" (2020).

Shapes: x `[..., d_in]`, weight2 `[d_out, d_hidden]`, y `[..., d_out]`. Two projections: weight1 (the gate's) and
weight_up `[d_hidden, d_in]`. A merged one: weight1 `[2 d_hidden, d_in]` and no weight_up; the gate is its first half,
or its second if `gate_second`.

Saved for backward are x, the pre-activations and the seed; the activation, the product and the dropout mask are
recomputed. `gated_dense` for training returns `(y, h, up)`: the values of both projections, or of the merged one and an
empty tensor. `gated_dense_inference` returns y.

With quantised operands, `hidden_format` rounds both projections, `result_format` what the activation gives, and
`act_format` what the last product reads, after dropout; see `packed_format`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.ops import rng
from fuse_pass.ops.activations import ACTIVATIONS
from fuse_pass.ops.dense import product, rows_of, shaped_like_rows_of, weight_gradient
from fuse_pass.ops.dense_act_dense import bias_of, fake_gradients, number_of_rows, output_shape
from fuse_pass.ops.library import (
    autocast_as_products,
    define,
    define_autograd,
    differentiable_grads,
    only_needed,
    placeholders,
)
from fuse_pass.ops.packed_format import quantize_packed, straight_through_packed

_TENSORS = (
    "Tensor x, Tensor weight1, Tensor? bias1, Tensor? weight_up, Tensor? bias_up, Tensor weight2, Tensor? bias2, "
    "Tensor? seed"
)
_SETTINGS = (
    "float p, str activation, float[] act_arguments, bool gate_second, int[] hidden_format=[], int[] act_format=[], "
    "int[] result_format=[]"
)


_Quantize = Callable[[Tensor, Sequence[int]], Tensor]


def _gate_and_up(
    h: Tensor, up: Tensor | None, gate_second: bool, hidden_format: Sequence[int], quantize: _Quantize = quantize_packed
) -> tuple[Tensor, Tensor]:
    h = quantize(h, hidden_format)
    if up is not None:
        return h, quantize(up, hidden_format)
    first, second = h.chunk(2, -1)
    return (second, first) if gate_second else (first, second)


def _gated(
    gate: Tensor,
    up: Tensor,
    seed: Tensor | None,
    p: float,
    activation: str,
    act_arguments: list[float],
    act_format: Sequence[int],
    result_format: Sequence[int],
    quantize: _Quantize = quantize_packed,
) -> Tensor:
    a = quantize(ACTIVATIONS[activation].forward(gate, act_arguments, None), result_format)
    return quantize(rng.dropout(a * up, seed, p), act_format)


def _forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight_up: Tensor | None,
    bias_up: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    act_arguments: list[float],
    gate_second: bool,
    hidden_format: Sequence[int] = (),
    act_format: Sequence[int] = (),
    result_format: Sequence[int] = (),
    prepack: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows_of(x)
    h = product(rows, weight1, bias1, prepack=prepack)
    up = None if weight_up is None else product(rows, weight_up, bias_up, prepack=prepack)
    halves = _gate_and_up(h, up, gate_second, hidden_format)
    a = _gated(*halves, seed, p, activation, act_arguments, act_format, result_format)
    y = product(a, weight2, bias2, prepack=prepack)
    return shaped_like_rows_of(x, y), h, h.new_empty(0) if up is None else up


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight1: Tensor,
    weight_up: Tensor | None,
    weight2: Tensor,
    h: Tensor,
    up: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    act_arguments: list[float],
    gate_second: bool,
    output_mask: list[bool],
    hidden_format: Sequence[int] = (),
    act_format: Sequence[int] = (),
    result_format: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """Gradients of x, weight1, bias1, weight_up, bias_up, weight2 and bias2; empty where `output_mask` is False."""
    *need_first, need_weight2, need_bias2 = output_mask
    grad, rows = rows_of(grad_y), rows_of(x)
    grads = placeholders(h, 7)
    gate_value, up_value = _gate_and_up(h, up, gate_second, hidden_format)  # quantisation is straight through
    projections: list[tuple[Tensor, Tensor]] = []
    if any(need_first):
        row = ACTIVATIONS[activation]
        grad_a = rng.dropout(product(grad, weight2.t()), seed, p)
        grad_gate = row.backward(grad_a * up_value, gate_value, act_arguments, None)
        grad_up = grad_a * quantize_packed(row.forward(gate_value, act_arguments, None), result_format)
        if weight_up is None:
            halves = [grad_up, grad_gate] if gate_second else [grad_gate, grad_up]
            projections = [(torch.cat(halves, -1), weight1)]
        else:
            projections = [(grad_gate, weight1), (grad_up, weight_up)]
    # Before any product that can wait: Inductor compiles all that stands between two products as one kernel.
    for place, (grad_hidden, _) in zip((2, 4), projections, strict=False):
        if need_first[place]:
            grads[place] = grad_hidden.sum(0)
    if need_bias2:
        grads[6] = grad.sum(0)
    if need_weight2:
        a = _gated(gate_value, up_value, seed, p, activation, act_arguments, act_format, result_format)
        grads[5] = weight_gradient(grad, a, weight2)
    for place, (grad_hidden, weight) in zip((1, 3), projections, strict=False):
        if need_first[place]:
            grads[place] = weight_gradient(grad_hidden, rows, weight)
    if need_first[0]:
        grads[0] = functools.reduce(operator.add, (product(g, weight.t()) for g, weight in projections)).view(x.shape)
    return tuple(grads)


def _fake(
    x: Tensor, weight1: Tensor, bias1: Any, weight_up: Tensor | None, bias_up: Any, weight2: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows = number_of_rows(x)
    up = x.new_empty(0) if weight_up is None else x.new_empty(rows, weight_up.shape[0])
    return x.new_empty(output_shape(x, weight2)), x.new_empty(rows, weight1.shape[0]), up


def _fake_backward(
    grad_y: Tensor, x: Tensor, weight1: Tensor, weight_up: Tensor | None, weight2: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    # rest: h, up, seed, p, activation, act_arguments, gate_second, output_mask, formats
    bias_up = None if weight_up is None else bias_of(weight_up)
    return fake_gradients((x, weight1, bias_of(weight1), weight_up, bias_up, weight2, bias_of(weight2)), rest[7])


gated_dense = define("gated_dense", f"({_TENSORS}, {_SETTINGS}) -> (Tensor y, Tensor h, Tensor up)", _forward, _fake)
gated_dense_inference = define(
    "gated_dense_inference",
    f"({_TENSORS}, {_SETTINGS}, bool prepack=False) -> Tensor",
    lambda *arguments: _forward(*arguments)[0],
    lambda *arguments: _fake(*arguments)[0],
)
gated_dense_backward = define(
    "gated_dense_backward",
    "(Tensor grad_y, Tensor x, Tensor weight1, Tensor? weight_up, Tensor weight2, Tensor h, Tensor? up, Tensor? seed, "
    "float p, str activation, float[] act_arguments, bool gate_second, bool[7] output_mask, "
    "int[] hidden_format=[], int[] act_format=[], int[] result_format=[]) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


# The tensor arguments that carry gradients, by position, in the order in which the backward op returns them.
_DIFFERENTIABLE = tuple(range(7))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.settings, ctx.formats = inputs[:8], inputs[8:12], inputs[12:]
    ctx.is_merged = inputs[3] is None
    kept = () if ctx.is_merged else (output[2],)
    ctx.save_for_backward(*tensors, output[1], *kept)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needed = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    if grad_y is None:
        return (None,) * len(ctx.needs_input_grad)
    saved = ctx.saved_tensors
    tensors, kept = saved[:8], saved[8:]
    if torch.is_grad_enabled():
        grads = differentiable_grads(_formula, tensors, (*ctx.settings, *ctx.formats), needed, grad_y)
    else:
        x, weight1, _, weight_up, _, weight2, _, seed = tensors
        h, up = kept[0], None if ctx.is_merged else kept[1]
        grads = torch.ops.fuse_pass.gated_dense_backward(
            grad_y, x, weight1, weight_up, weight2, h, up, seed, *ctx.settings, needed, *ctx.formats
        )
    return only_needed(grads, needed, len(ctx.needs_input_grad))


def _formula(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight_up: Tensor | None,
    bias_up: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    seed: Tensor | None,
    p: float,
    activation: str,
    act_arguments: list[float],
    gate_second: bool,
    hidden_format: Sequence[int] = (),
    act_format: Sequence[int] = (),
    result_format: Sequence[int] = (),
) -> Tensor:
    """`gated_dense` in differentiable PyTorch, for second derivatives."""
    rows = rows_of(x)
    up = None if weight_up is None else F.linear(rows, weight_up, bias_up)
    h = F.linear(rows, weight1, bias1)
    halves = _gate_and_up(h, up, gate_second, hidden_format, straight_through_packed)
    a = _gated(*halves, seed, p, activation, act_arguments, act_format, result_format, straight_through_packed)
    return F.linear(a, weight2, bias2).view(output_shape(x, weight2))


define_autograd(gated_dense, _setup, _autograd)
autocast_as_products(gated_dense, gated_dense_inference)
