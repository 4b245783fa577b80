"""Matrix products behind every Linear, sent to the library that is fastest on this machine.

`product(a, b)` is `a @ b.T (+ bias)` for matrices of any strides, so the three products of a Linear are
`product(x, weight, bias)`, `product(grad, weight.t())` and `product(grad.t(), x.t())`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fuse_pass.inductor import compat, gemm
from fuse_pass.ops.activations import ACTIVATIONS
from fuse_pass.ops.library import define


def rows_of(x: Tensor) -> Tensor:
    """`[..., features] → [rows, features]`; a single vector is one row."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a [m, k] @ b [n, k].T + bias [n] → [m, n]`."""
    return _product(a, b, bias, _provider(a, b), None, ())


def product_with_activation(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str, arguments: Sequence[float], weight: Tensor | None
) -> Tensor:
    """`activation(product(a, b, bias))`, in one call where a library offers that and it pays."""
    row = ACTIVATIONS[activation]
    if row.post_op is not None and _provider(a, b, with_activation=True) == gemm.ONEDNN:
        return _product(a, b, bias, gemm.ONEDNN, row.post_op, arguments)
    return row.forward(product(a, b, bias), tuple(arguments), weight)


def _provider(a: Tensor, b: Tensor, *, with_activation: bool = False) -> str:
    sizes = [compat.size_hint(size) for size in (*a.shape, b.shape[0])]
    known = [size for size in sizes if size is not None]
    flop = None
    if len(known) == len(sizes):
        flop = 2 * known[0] * known[1] * known[2]
    return gemm.provider(a.device, a.dtype, flop, with_activation=with_activation)


def _product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    provider: str,
    post_op: tuple[str, str] | None,
    arguments: Sequence[float],
) -> Tensor:
    if provider == gemm.ONEDNN:
        attribute, algorithm = post_op or ("none", "")
        return torch.ops.fuse_pass.gemm(a, b, bias, attribute, list(arguments), algorithm)  # type: ignore[no-any-return]
    if provider == gemm.VIA_FLOAT32:
        wide_bias = None if bias is None else bias.float()
        return _product(a.float(), b.float(), wide_bias, _provider(a.float(), b.float()), None, ()).to(a.dtype)
    return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())


def _gemm_onednn(
    a: Tensor, b: Tensor, bias: Tensor | None, attribute: str, arguments: list[float], algorithm: str
) -> Tensor:
    linear = compat.onednn_linear()
    if linear is None:
        raise RuntimeError(
            "fuse_pass::gemm needs oneDNN (torch.backends.mkldnn.is_available()), which this build of PyTorch lacks"
        )
    # oneDNN reads a bias as if it were contiguous, whatever its strides.
    packed_bias = None if bias is None else bias.contiguous()
    result: Tensor = linear(_dense_rows(a), _dense_rows(b), packed_bias, attribute, arguments, algorithm)
    return result


def _dense_rows(matrix: Tensor) -> Tensor:
    """oneDNN takes row- and column-major matrices as they are; anything else (an expanded gradient) is copied."""
    rows, columns = matrix.stride()
    row_major = columns == 1 and rows >= matrix.shape[1]
    column_major = rows == 1 and columns >= matrix.shape[0]
    return matrix if row_major or column_major else matrix.contiguous()


def _gemm_fake(
    a: Tensor, b: Tensor, bias: Tensor | None, attribute: str, arguments: list[float], algorithm: str
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


define(
    "gemm",
    "(Tensor a, Tensor b, Tensor? bias, str attribute, float[] arguments, str algorithm) -> Tensor",
    body=_gemm_onednn,
    fake=_gemm_fake,
    dispatch_key="CPU",
    decompose=False,
)
