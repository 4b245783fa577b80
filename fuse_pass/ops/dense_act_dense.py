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

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fuse_pass.gemm.product import product, product_with_activation, weight_gradient
from fuse_pass.numerics import random_bits
from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.numerics.tensors import rows_of, shaped_like_rows_of
from fuse_pass.ops.arguments import Seed, Weight
from fuse_pass.ops.fused_op import Gradients, ProductOp, register
from fuse_pass.ops.packed_format import quantize_packed, straight_through_packed

Quantize = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Between:
    """What stands between the two products."""

    act_weight: Tensor | None
    seed: Seed | None
    p: float
    activation: str
    act_arguments: Sequence[float]
    hidden_format: Sequence[int] = ()
    act_format: Sequence[int] = ()
    result_format: Sequence[int] = ()

    def activated(self, h: Tensor, quantize: Quantize = quantize_packed) -> Tensor:
        row = ACTIVATIONS[self.activation]
        return self.dropped(row.forward(quantize(h, self.hidden_format), self.act_arguments, self.act_weight), quantize)

    def dropped(self, a: Tensor, quantize: Quantize = quantize_packed) -> Tensor:
        return quantize(random_bits.dropout(quantize(a, self.result_format), self.seed, self.p), self.act_format)

    def gradients(self, needed: Set[str], grad_a: Tensor, h: Tensor) -> dict[str, Tensor]:
        """Of h and the weight of the activation; quantisation is straight through."""
        row, seen, grads = ACTIVATIONS[self.activation], quantize_packed(h, self.hidden_format), {}
        if "h" in needed:
            grads["h"] = row.backward(grad_a, seen, self.act_arguments, self.act_weight)
        if "act_weight" in needed:
            assert self.act_weight is not None
            assert row.weight_backward is not None
            grads["act_weight"] = row.weight_backward(grad_a, seen, self.act_weight).to(self.act_weight.dtype)
        return grads


@dataclass(frozen=True)
class ActDense(ProductOp):
    recompute = True

    h: Tensor
    weight2: Tensor
    bias2: Tensor | None
    between: Between

    def forward(self) -> Tensor:
        a = self.between.activated(rows_of(self.h))
        return shaped_like_rows_of(self.h, product(a, self.weight2, self.bias2))

    def shapes(self) -> Tensor:
        return self.h.new_empty(output_shape(self.h, self.weight2))

    def formula(self) -> Tensor:
        a = self.between.activated(rows_of(self.h), straight_through_packed)
        return F.linear(a, self.weight2, self.bias2).view(output_shape(self.h, self.weight2))


@dataclass(frozen=True)
class ActDenseGradients(Gradients):
    of = ("h", "weight2", "bias2", "act_weight")

    h: Tensor
    weight2: Tensor
    between: Between

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        grad, h = rows_of(grad_y), rows_of(self.h)
        grads = {}
        if "weight2" in needed:
            grads["weight2"] = weight_gradient(grad, self.between.activated(h), self.weight2)
        if needed & {"h", "act_weight"}:
            grad_a = random_bits.dropout(product(grad, self.weight2.t()), self.between.seed, self.between.p)
            grads |= self.between.gradients(needed, grad_a, h)
        if "h" in needed:
            grads["h"] = grads["h"].view(self.h.shape)
        if "bias2" in needed:  # last, in the kernel of what follows the product; before it, it would be one of its own
            grads["bias2"] = grad.sum(0)
        return grads


@dataclass(frozen=True)
class DenseActDense(ProductOp):
    results: ClassVar[tuple[str, ...]] = ("y", "h")
    recompute = True

    x: Tensor
    weight1: Weight
    bias1: Tensor | None
    weight2: Weight
    bias2: Tensor | None
    between: Between

    def forward(self) -> tuple[Tensor, Tensor] | Tensor:
        h = product(rows_of(self.x), self.weight1, self.bias1)
        return shaped_like_rows_of(self.x, product(self.between.activated(h), self.weight2, self.bias2)), h

    def shapes(self) -> tuple[Tensor, Tensor] | Tensor:
        h = self.x.new_empty(number_of_rows(self.x), self.weight1.shape[0])
        return self.x.new_empty(output_shape(self.x, self.weight2)), h

    def formula(self) -> Tensor:
        h = F.linear(self.x, self.weight1, self.bias1)
        return ActDense(h, self.weight2, self.bias2, self.between).formula()


@dataclass(frozen=True)
class DenseActDenseGradients(Gradients):
    of = ("x", "weight1", "bias1", "weight2", "bias2", "act_weight")

    x: Tensor
    weight1: Tensor
    weight2: Tensor
    h: Tensor
    between: Between

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        tail = ActDenseGradients(self.h, self.weight2, self.between)
        first = {"h"} if needed & {"x", "weight1", "bias1"} else set()
        grads = tail.backward(first | (needed & {"bias2", "act_weight"}), grad_y)
        # Before any product that can wait: Inductor compiles all that stands between two products as one kernel.
        if "bias1" in needed:
            grads["bias1"] = grads["h"].sum(0)
        grads |= tail.backward(needed & {"weight2"}, grad_y)
        if "x" in needed:
            grads["x"] = product(grads["h"], self.weight1.t()).view(self.x.shape)
        if "weight1" in needed:
            grads["weight1"] = weight_gradient(grads["h"], rows_of(self.x), self.weight1)
        return grads


@dataclass(frozen=True)
class DenseActDenseInference(DenseActDense):
    results = ("y",)
    recompute = False

    prepack: bool = False

    def forward(self) -> Tensor:
        rows, between, prepack = rows_of(self.x), self.between, self.prepack
        if between.hidden_format:  # something stands between the product and the activation
            a = between.activated(product(rows, self.weight1, self.bias1, is_constant=prepack))
        else:
            act = (between.activation, between.act_arguments, between.act_weight)
            a = between.dropped(product_with_activation(rows, self.weight1, self.bias1, *act, is_constant=prepack))
        return shaped_like_rows_of(self.x, product(a, self.weight2, self.bias2, is_constant=prepack))

    def shapes(self) -> Tensor:
        return self.x.new_empty(output_shape(self.x, self.weight2))


def output_shape(x: Tensor, weight2: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], weight2.shape[0])


def number_of_rows(x: Tensor) -> int:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


dense_act_dense = register("dense_act_dense", DenseActDense, DenseActDenseGradients)
dense_act_dense_inference = register("dense_act_dense_inference", DenseActDenseInference, inference_of=DenseActDense)
act_dense = register("act_dense", ActDense, ActDenseGradients)
