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

from fuse_pass.gemm import onednn
from fuse_pass.gemm.problem import Epilogue, GemmProblem
from fuse_pass.gemm.providers import Aten, Packed, best
from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.numerics.tensors import is_column_major

# Of activations that are one function written in two ways, the first.
_BY_POST_OP = {row.post_op: row for row in reversed(ACTIVATIONS.values()) if row.post_op is not None}


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, *, is_constant: bool = False) -> Tensor:
    """`a [m, k] @ b [n, k].T + bias [n] → [m, n]`; of int8 matrices in int32, exact.

    Args:
        a: of any strides.
        b: of any strides.
        bias: of any strides.
        is_constant: b is a weight that stays as it is from call to call.
    """
    _refuse_mixed_dtypes(a, b, bias)
    return best(GemmProblem.of(a, b, is_constant=is_constant)).run(a, b, bias, None)


def product_with_activation(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str,
    arguments: Sequence[float],
    weight: Tensor | None,
    *,
    is_constant: bool = False,
) -> Tensor:
    """`activation(product(a, b, bias))`, in one call where a library offers that and it pays."""
    _refuse_mixed_dtypes(a, b, bias)
    epilogue = Epilogue(ACTIVATIONS[activation], arguments, weight)
    return best(GemmProblem.of(a, b, activation=activation, is_constant=is_constant)).run(a, b, bias, epilogue)


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
    return _of_transposed(x, grad).t() if column_major else _of_transposed(grad, x)


def _of_transposed(a: Tensor, b: Tensor) -> Tensor:
    """`a [k, m].T @ b [k, n]`."""
    return best(GemmProblem.of(a.t(), b.t(), both_transposed=True)).run(a.t(), b.t(), None, None)


def pays(problem: GemmProblem) -> bool:
    """Whether anything is faster than PyTorch's own choice; with an activation, whether it is in the same kernel."""
    provider = best(problem)
    return provider.name != Aten.name and (not problem.activation or provider.computes_activation)


def packing_pays(weight: Tensor, rows: int | torch.SymInt) -> bool:
    """Whether a product of so many rows with a `[n, k]` weight is faster by a copy that is packed once."""
    problem = GemmProblem(weight.device, weight.dtype, (rows, *weight.shape), is_constant=True)
    return isinstance(best(problem), Packed)


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
        if (attribute, algorithm) not in _BY_POST_OP and attribute != "none":
            raise
        _say_once(str(error))
    return gemm_aten(a, b, bias, attribute, arguments, algorithm)


def gemm_aten(
    a: Tensor, b: Tensor, bias: Tensor | None, attribute: str, arguments: list[float], algorithm: str
) -> Tensor:
    """What `fuse_pass::gemm` computes, where oneDNN does not multiply: of the activations those that ours are."""
    y = product(a, b, bias)
    return y if attribute == "none" else _BY_POST_OP[attribute, algorithm].forward(y, arguments, None)


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
