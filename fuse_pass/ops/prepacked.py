"""A Linear in inference whose weight is packed once (see `gemm.packed_weights`), with an activation or without.

Shapes: x `[..., d_in]`, weight `[d_out, d_in]`, y `[..., d_out]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fuse_pass.gemm.product import product, product_with_activation
from fuse_pass.numerics.tensors import rows_of, shaped_like_rows_of
from fuse_pass.ops.fused_op import FusedOp, register


@dataclass(frozen=True)
class DensePrepacked(FusedOp):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str = ""
    act_arguments: Sequence[float] = ()

    def forward(self) -> Tensor:
        rows, weight, bias, act = rows_of(self.x), self.weight, self.bias, self.activation
        if act:
            y = product_with_activation(rows, weight, bias, act, self.act_arguments, None, is_constant=True)
        else:
            y = product(rows, weight, bias, is_constant=True)
        return shaped_like_rows_of(self.x, y)

    def shapes(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.weight.shape[0]))


register("dense_prepacked", DensePrepacked)
