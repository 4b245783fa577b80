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
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.gemm.product import product, weight_gradient
from fuse_pass.numerics import random_bits
from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.numerics.tensors import rows_of, shaped_like_rows_of
from fuse_pass.ops.arguments import Seed, Weight
from fuse_pass.ops.dense_act_dense import Quantize, number_of_rows, output_shape
from fuse_pass.ops.fused_op import Gradients, ProductOp, register
from fuse_pass.ops.packed_format import quantize_packed, straight_through_packed


@dataclass(frozen=True)
class Gate:
    """What stands between the projections and the last product."""

    seed: Seed | None
    p: float
    activation: str
    act_arguments: Sequence[float]
    gate_second: bool
    hidden_format: Sequence[int] = ()
    act_format: Sequence[int] = ()
    result_format: Sequence[int] = ()

    def halves(self, h: Tensor, up: Tensor | None, quantize: Quantize = quantize_packed) -> tuple[Tensor, Tensor]:
        """What the activation reads, and what it is multiplied with."""
        h = quantize(h, self.hidden_format)
        if up is not None:
            return h, quantize(up, self.hidden_format)
        first, second = h.chunk(2, -1)
        return (second, first) if self.gate_second else (first, second)

    def activated(self, gate: Tensor, quantize: Quantize = quantize_packed) -> Tensor:
        return quantize(ACTIVATIONS[self.activation].forward(gate, self.act_arguments, None), self.result_format)

    def gated(self, gate: Tensor, up: Tensor, quantize: Quantize = quantize_packed) -> Tensor:
        return quantize(random_bits.dropout(self.activated(gate, quantize) * up, self.seed, self.p), self.act_format)


@dataclass(frozen=True)
class GatedDense(ProductOp):
    results: ClassVar[tuple[str, ...]] = ("y", "h", "up")
    recompute = True

    x: Tensor
    weight1: Weight
    bias1: Tensor | None
    weight_up: Weight | None
    bias_up: Tensor | None
    weight2: Weight
    bias2: Tensor | None
    gate: Gate

    def forward(self) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        y, h, up = self._forward()
        return y, h, h.new_empty(0) if up is None else up

    def _forward(self, *, prepack: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = rows_of(self.x)
        h = product(rows, self.weight1, self.bias1, is_constant=prepack)
        up = None if self.weight_up is None else product(rows, self.weight_up, self.bias_up, is_constant=prepack)
        y = product(self.gate.gated(*self.gate.halves(h, up)), self.weight2, self.bias2, is_constant=prepack)
        return shaped_like_rows_of(self.x, y), h, up

    def shapes(self) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        x, rows = self.x, number_of_rows(self.x)
        up = x.new_empty(0) if self.weight_up is None else x.new_empty(rows, self.weight_up.shape[0])
        return x.new_empty(output_shape(x, self.weight2)), x.new_empty(rows, self.weight1.shape[0]), up

    def formula(self) -> Tensor:
        rows = rows_of(self.x)
        up = None if self.weight_up is None else F.linear(rows, self.weight_up, self.bias_up)
        halves = self.gate.halves(F.linear(rows, self.weight1, self.bias1), up, straight_through_packed)
        a = self.gate.gated(*halves, straight_through_packed)
        return F.linear(a, self.weight2, self.bias2).view(output_shape(self.x, self.weight2))


@dataclass(frozen=True)
class GatedDenseGradients(Gradients):
    of = ("x", "weight1", "bias1", "weight_up", "bias_up", "weight2", "bias2")

    x: Tensor
    weight1: Tensor
    weight_up: Tensor | None
    weight2: Tensor
    h: Tensor
    up: Tensor
    gate: Gate

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        grad, rows, gate = rows_of(grad_y), rows_of(self.x), self.gate
        up = None if self.weight_up is None else self.up
        gate_value, up_value = gate.halves(self.h, up)  # quantisation is straight through
        projections: list[tuple[str, Tensor, Tensor]] = []
        if needed - {"weight2", "bias2"}:
            grad_a = random_bits.dropout(product(grad, self.weight2.t()), gate.seed, gate.p)
            row = ACTIVATIONS[gate.activation]
            grad_gate = row.backward(grad_a * up_value, gate_value, gate.act_arguments, None)
            grad_up = grad_a * gate.activated(gate_value)
            if self.weight_up is None:
                halves = [grad_up, grad_gate] if gate.gate_second else [grad_gate, grad_up]
                projections = [("1", torch.cat(halves, -1), self.weight1)]
            else:
                projections = [("1", grad_gate, self.weight1), ("_up", grad_up, self.weight_up)]
        # Before any product that can wait: Inductor compiles all that stands between two products as one kernel.
        grads = {f"bias{name}": hidden.sum(0) for name, hidden, _ in projections if f"bias{name}" in needed}
        if "bias2" in needed:
            grads["bias2"] = grad.sum(0)
        if "weight2" in needed:
            grads["weight2"] = weight_gradient(grad, gate.gated(gate_value, up_value), self.weight2)
        for name, hidden, weight in projections:
            if f"weight{name}" in needed:
                grads[f"weight{name}"] = weight_gradient(hidden, rows, weight)
        if "x" in needed:
            of_x = (product(hidden, weight.t()) for _, hidden, weight in projections)
            grads["x"] = functools.reduce(operator.add, of_x).view(self.x.shape)
        return grads


@dataclass(frozen=True)
class GatedDenseInference(GatedDense):
    results = ("y",)
    recompute = False

    prepack: bool = False

    def forward(self) -> Tensor:
        return self._forward(prepack=self.prepack)[0]

    def shapes(self) -> Tensor:
        return self.x.new_empty(output_shape(self.x, self.weight2))


gated_dense = register("gated_dense", GatedDense, GatedDenseGradients)
gated_dense_inference = register("gated_dense_inference", GatedDenseInference, inference_of=GatedDense)
