"""The matrix products behind every Linear, sent to the fastest library of this machine.

`product(a, b)` is `a @ b.T (+ bias)` for matrices of any strides, so the three products of a Linear are
`product(x, weight, bias)`, `product(grad, weight.t())` and `weight_gradient(grad, x, weight)`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fuse_pass.gemm import choice, onednn
from fuse_pass.inductor import compat
from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.numerics.tensors import accumulation_dtype, is_column_major

# Of activations that are one function written in two ways, the first.
_BY_POST_OP = {row.post_op: row for row in reversed(ACTIVATIONS.values()) if row.post_op is not None}


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, *, prepack: bool = False) -> Tensor:
    """`a [m, k] @ b [n, k].T + bias [n] → [m, n]`.

    Args:
        a: of any strides.
        b: of any strides.
        bias: of any strides.
        prepack: b is a weight that stays as it is from call to call.
    """
    _refuse_mixed_dtypes(a, b, bias)
    if prepack and prepacking_pays(b, a.shape[0]):
        return _prepacked(a, b, bias, None, ())
    if _sums_pay(a, b):
        return _sums(a, b, bias)
    return _product(a, b, bias, _provider(a, b), None, ())


def _refuse_mixed_dtypes(a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """PyTorch's products refuse them too; sums and oneDNN (from 3.13 on) would promote."""
    if a.dtype != b.dtype or (bias is not None and bias.dtype != b.dtype):
        dtypes = f"{a.dtype} and {b.dtype}" + ("" if bias is None else f" with a bias of {bias.dtype}")
        raise RuntimeError(f"expected a product of one dtype, got {dtypes}; convert the input or the module")


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`grad [rows, d_out].T @ x [rows, d_in] → [d_out, d_in]`, laid out like the weight.

    A weight that is stored `[d_in, d_out]` and reaches us transposed would otherwise get a gradient to be copied.
    """
    return weight_gradient_by_layout(grad, x, is_column_major(weight))


def weight_gradient_by_layout(grad: Tensor, x: Tensor, column_major: bool) -> Tensor:
    """The same for a weight that is not at hand, stored `[d_in, d_out]` if `column_major`."""
    if column_major:
        return _product(x.t(), grad.t(), None, _provider(x.t(), grad.t(), weight_gradient=True), None, ()).t()
    return _product(grad.t(), x.t(), None, _provider(grad.t(), x.t(), weight_gradient=True), None, ())


def product_with_activation(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str,
    arguments: Sequence[float],
    weight: Tensor | None,
    *,
    prepack: bool = False,
) -> Tensor:
    """`activation(product(a, b, bias))`, in one call where a library offers that and it pays."""
    _refuse_mixed_dtypes(a, b, bias)
    row = ACTIVATIONS[activation]
    if prepack and row.post_op is not None and prepacking_pays(b, a.shape[0]):
        return _prepacked(a, b, bias, row.post_op, arguments)
    if row.post_op is not None and not _sums_pay(a, b) and _provider(a, b, with_activation=True) == choice.ONEDNN:
        return _product(a, b, bias, choice.ONEDNN, row.post_op, arguments)
    return row.forward(product(a, b, bias, prepack=prepack), tuple(arguments), weight)


def prepacking_pays(weight: Tensor, rows: int | torch.SymInt) -> bool:
    """Whether a product of so many rows with a `[n, k]` weight is faster by a copy that is packed once."""
    # A single row, which reads the weight once and does little with it, is faster as sums over the weight as it is.
    is_single = isinstance(rows, int) and rows == 1
    if is_single and choice.sums_pay(weight.device, weight.dtype, (rows, *weight.shape), column_major=False):
        return False
    return choice.prepacking_pays(weight.device, weight.dtype, [compat.size_hint(size) for size in weight.shape])


def _prepacked(
    a: Tensor, weight: Tensor, bias: Tensor | None, post_op: tuple[str, str] | None, arguments: Sequence[float]
) -> Tensor:
    attribute, algorithm = post_op or ("none", "")
    result: Tensor = torch.ops.fuse_pass.gemm_prepacked(a, weight, bias, attribute, list(arguments), algorithm)
    return result


def pays(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[int | torch.SymInt],
    *,
    column_major: bool = False,
    act: str = "",
) -> bool:
    """Whether anything is faster at `x [m, k] @ weight [n, k].T` than PyTorch's own choice.

    Args:
        device: of the operands.
        dtype: in which the product is computed.
        sizes: m, n and k.
        column_major: the weight is stored `[k, n]`.
        act: an activation that follows in the same call.
    """
    if choice.sums_pay(device, dtype, sizes, column_major=column_major):
        return True
    hints = [compat.size_hint(size) for size in sizes]
    if act:
        post_op = ACTIVATIONS[act].post_op
        return post_op is not None and choice.provider(device, dtype, hints, with_activation=True) == choice.ONEDNN
    return choice.provider(device, dtype, hints) != choice.ATEN


def _provider(a: Tensor, b: Tensor, *, with_activation: bool = False, weight_gradient: bool = False) -> str:
    sizes = [compat.size_hint(size) for size in (a.shape[0], b.shape[0], a.shape[1])]
    return choice.provider(a.device, a.dtype, sizes, with_activation=with_activation, weight_gradient=weight_gradient)


def _sums_pay(a: Tensor, b: Tensor) -> bool:
    """In a graph only: run one by one, the calls would store every product before it is summed."""
    column_major, stride = is_column_major(b), b.stride(1)
    is_dense = column_major or (isinstance(stride, int) and stride == 1)
    sizes = (a.shape[0], *b.shape)
    return compat.is_compiling() and is_dense and choice.sums_pay(a.device, a.dtype, sizes, column_major=column_major)


def _sums(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The product as one sum per row and column, in one loop over the rows of b."""
    wide = accumulation_dtype(a.dtype)
    # Stored, or what computes a would be computed anew for every column.
    rows = compat.stored_once(a.contiguous()).to(wide).unbind(0)
    y = torch.stack([(row * b.to(wide)).sum(-1) for row in rows])
    return (y if bias is None else y + bias.to(wide)).to(a.dtype)


def _product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    provider: str,
    post_op: tuple[str, str] | None,
    arguments: Sequence[float],
) -> Tensor:
    if provider == choice.ONEDNN:
        attribute, algorithm = post_op or ("none", "")
        return torch.ops.fuse_pass.gemm(a, b, bias, attribute, list(arguments), algorithm)  # type: ignore[no-any-return]
    if provider == choice.VIA_FLOAT32:
        wide_bias = None if bias is None else bias.float()
        return _product(a.float(), b.float(), wide_bias, _provider(a.float(), b.float()), None, ()).to(a.dtype)
    return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())


def gemm_onednn(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    attribute: str,
    arguments: list[float],
    algorithm: str,
    packed: Tensor | None = None,
) -> Tensor:
    """`fuse_pass::gemm`, with b also as `onednn.pack` has packed it.

    Who compiles asks first what this processor has. A call that finds no such product was compiled on another one, or
    written by hand: it computes by aten, and says so once.
    """
    # oneDNN reads a bias as if it were contiguous, whatever its strides.
    packed_bias = None if bias is None else bias.contiguous()
    columns = _dense_rows(b) if packed is None else packed
    try:
        return onednn.product(_dense_rows(a), columns, packed_bias, attribute, arguments, algorithm)
    except onednn.NoPrimitiveError as error:
        act = _BY_POST_OP.get((attribute, algorithm))
        if act is None and attribute != "none":
            raise
        _say_once(str(error))
    y = _product(a, b, bias, _provider(a, b), None, ())
    return y if act is None else act.forward(y, arguments, None)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _dense_rows(matrix: Tensor) -> Tensor:
    """oneDNN takes row- and column-major matrices as they are; anything else (an expanded gradient) is copied."""
    rows, columns = matrix.stride()
    row_major = columns == 1 and rows >= matrix.shape[1]
    column_major = rows == 1 and columns >= matrix.shape[0]
    return matrix if row_major or column_major else matrix.contiguous()


def gemm_fake(
    a: Tensor, b: Tensor, bias: Tensor | None, attribute: str, arguments: list[float], algorithm: str
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])
