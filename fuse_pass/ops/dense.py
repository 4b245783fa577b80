"""A Linear as one op, `y = x Wᵀ + b`.

Shapes: x `[..., d_in]`, weight `[d_out, d_in]`, y `[..., d_out]`. Two ops:

- `dense` with its gradients; x and the weight are saved for backward;
- `dense_act` for inference, with an activation in the same call where the library has it.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch import Tensor

from fuse_pass.gemm.product import product, product_with_activation, weight_gradient_by_layout
from fuse_pass.numerics.tensors import is_column_major, rows_of, shaped_like_rows_of
from fuse_pass.ops.arguments import Weight
from fuse_pass.ops.fused_op import Gradients, ProductOp, register


@dataclass(frozen=True)
class Dense(ProductOp):
    x: Tensor
    weight: Weight
    bias: Tensor | None

    def forward(self) -> Tensor:
        return shaped_like_rows_of(self.x, product(rows_of(self.x), self.weight, self.bias))

    def shapes(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.weight.shape[0]))

    def saved(self, results: tuple[Tensor, ...], needed: Set[str]) -> DenseGradients:
        """What eager keeps and no more: whatever needs no gradient may be written to afterwards."""
        return DenseGradients(
            self.x if "weight" in needed else None,
            self.weight if "x" in needed else None,
            is_column_major(self.weight),
        )


@dataclass(frozen=True)
class DenseGradients(Gradients):
    """x is there where the weight needs a gradient, and the weight, stored by columns or not, where x does."""

    of = ("x", "weight", "bias")

    x: Tensor | None
    weight: Tensor | None
    column_major: bool

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        grad, grads = rows_of(grad_y), {}
        if self.weight is not None and "x" in needed:
            grads["x"] = product(grad, self.weight.t()).view(self._input_shape(grad_y, self.weight))
        if self.x is not None and "weight" in needed:
            grads["weight"] = weight_gradient_by_layout(grad, rows_of(self.x), self.column_major)
        if "bias" in needed:
            grads["bias"] = grad.sum(0)
        return grads

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        rows = rows_of(grad_y)
        grads = {"bias": rows.sum(0)}
        if self.weight is not None:
            grads["x"] = grad_y @ self.weight
        if self.x is not None:
            grads["weight"] = rows.t() @ rows_of(self.x)
        return grads

    def like(self, name: str, grad_y: Tensor) -> Tensor:
        if name == "x":
            assert self.weight is not None
            return grad_y.new_empty(self._input_shape(grad_y, self.weight))
        if name == "bias":
            return grad_y.new_empty(grad_y.shape[-1])
        assert self.x is not None
        sizes = (grad_y.shape[-1], self.x.shape[-1])
        return grad_y.new_empty(sizes[::-1]).t() if self.column_major else grad_y.new_empty(sizes)

    @staticmethod
    def _input_shape(grad_y: Tensor, weight: Tensor) -> tuple[int, ...]:
        return (*grad_y.shape[:-1], weight.shape[1])


@dataclass(frozen=True)
class DenseAct(Dense):
    activation: str
    act_arguments: Sequence[float]

    def forward(self) -> Tensor:
        rows = rows_of(self.x)
        y = product_with_activation(rows, self.weight, self.bias, self.activation, self.act_arguments, None)
        return shaped_like_rows_of(self.x, y)


dense = register("dense", Dense, DenseGradients)
dense_act = register("dense_act", DenseAct)
