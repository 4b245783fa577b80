"""Products as ops that stay one call in generated code: oneDNN's, and those of integers."""

from __future__ import annotations

import torch
from torch import Tensor

from fuse_pass.gemm import packed_weights
from fuse_pass.gemm.product import gemm_aten, gemm_fake, gemm_onednn, product
from fuse_pass.ops.library import define


def _gemm_prepacked(
    a: Tensor, weight: Tensor, bias: Tensor | None, attribute: str, arguments: list[float], algorithm: str
) -> Tensor:
    return gemm_onednn(a, weight, bias, attribute, arguments, algorithm, packed=packed_weights.PACKED.of(weight))


for _name, _body, _second in (("gemm", gemm_onednn, "b"), ("gemm_prepacked", _gemm_prepacked, "weight")):
    define(
        _name,
        f"(Tensor a, Tensor {_second}, Tensor? bias, str attribute, float[] arguments, str algorithm) -> Tensor",
        body=_body,
        fake=gemm_fake,
        dispatch_key="CPU",
        in_aten=gemm_aten,
    )

# `int8 [m, k] @ int8 [n, k].T → int32 [m, n]`, exact.
int8_product = define(
    "int8_product",
    "(Tensor a, Tensor b) -> Tensor",
    body=product,
    fake=lambda a, b: a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32),
    in_aten=product,
)
