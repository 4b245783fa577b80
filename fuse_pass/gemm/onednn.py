"""oneDNN's product of plain matrices, with its operands laid out so that a large float32 one runs at full rate.

oneDNN transposes an operand that is stored by columns anew for every block of the result. Where both are, as in the
gradient of a weight, blocks of 1024 rows stay in the cache and are added up inside the calls: 1.1-1.2 times as fast on
one AMD Zen 5 core (torch 2.13, 4096 rows of 768 and 3072 columns), and half the error. Where a weight is, it is copied
by rows first: 1.1 times as fast. Below 3072 rows there was nothing to gain.

Not every processor has every product: in bfloat16 oneDNN needs AVX-512 or AVX-NE-CONVERT, in float16 more. It is asked
before, and a dtype in which a product fails all the same is not tried again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fuse_pass.inductor import compat, private

_MANY_ROWS = 3072
_BLOCK = 1024
_HALVES = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, *_HALVES)
# What oneDNN says where it has no code for an operation, and what PyTorch says where it does not let it try.
_NO_PRIMITIVE = ("could not create a primitive", "path needs the cpu support")
# By these the user limits oneDNN and MKL, or lets them compute less exactly.
_SETTINGS = ("MAX_CPU_ISA", "CPU_ISA_HINTS", "DEFAULT_FPMATH_MODE")
_VARIABLES = (*(f"{prefix}_{name}" for prefix in ("ONEDNN", "DNNL") for name in _SETTINGS), "MKL_ENABLE_INSTRUCTIONS")

# Dtypes in which a product has failed in this process.
_failed: set[torch.dtype] = set()


class NoPrimitiveError(RuntimeError):
    """oneDNN has no product in this dtype on this processor."""


def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products in this dtype here: it says so, and none has failed."""
    if dtype not in _DTYPES or dtype in _failed or compat.onednn_linear() is None:
        return False
    return dtype not in _HALVES or compat.has_fast_cpu_dtype(dtype)


def abilities() -> str:
    """What a measurement or a compiled graph of this process takes for granted of oneDNN, for their keys."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in _DTYPES if multiplies(dtype)]
    limits = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return f"oneDNN {compat.onednn_version()}: {' '.join((*dtypes, *limits))}"


@contextlib.contextmanager
def asked_for(dtype: torch.dtype) -> Iterator[None]:
    """Calls of oneDNN in this dtype; where one turns out not to exist, `multiplies` is False from then on.

    Raises:
        NoPrimitiveError: oneDNN cannot, or just could not, multiply this dtype here.
    """
    if not multiplies(dtype):
        raise NoPrimitiveError(_message(dtype))
    try:
        yield
    except RuntimeError as error:
        if not _tells_of_no_primitive(error):
            raise
        _failed.add(dtype)
        raise NoPrimitiveError(_message(dtype)) from error


def _tells_of_no_primitive(error: RuntimeError) -> bool:
    return any(text in str(error) for text in _NO_PRIMITIVE)


def _message(dtype: torch.dtype) -> str:
    where = "in this build of PyTorch" if compat.onednn_linear() is None else "on this processor"
    name = str(dtype).removeprefix("torch.")
    return (
        f"fuse_pass::gemm: oneDNN has no product in {name} {where}; PyTorch's own product is used. "
        "A graph that was compiled on another machine is best compiled again on this one"
    )


def pack(weight: Tensor, rows: int) -> Tensor:
    """A copy of a `[n, k]` weight in oneDNN's own order for so many rows; opaque but to `product`.

    Raises:
        NoPrimitiveError: see `asked_for`.
    """
    with asked_for(weight.dtype):
        return compat.pack_onednn_weight(weight, rows)


def product(
    a: Tensor, b: Tensor, bias: Tensor | None, attribute: str, arguments: Sequence[float], algorithm: str
) -> Tensor:
    """`a [m, k] @ b [n, k].T + bias [n]`, followed by an activation; a and b are stored by rows or by columns,
    or b by `pack`.

    Raises:
        NoPrimitiveError: this processor, or this build of PyTorch, has no such product.
        RuntimeError: the operands do not fit each other.
    """
    # Called for every product: what costs time (10 us for `asked_for`) is left to the call that fails.
    if a.dtype in _failed:
        raise NoPrimitiveError(_message(a.dtype))
    try:
        return _product(a, b, bias, attribute, arguments, algorithm)
    except RuntimeError as error:
        # Of operands that do not fit each other oneDNN says the same.
        if not _tells_of_no_primitive(error) or not _fit(a, b, bias):
            raise
        _failed.add(a.dtype)
        raise NoPrimitiveError(_message(a.dtype)) from error


def _fit(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    is_bias = bias is None or (bias.dtype is b.dtype and bias.shape == b.shape[:1])
    return a.dtype is b.dtype and a.shape[1] == b.shape[1] and is_bias


def _product(
    a: Tensor, b: Tensor, bias: Tensor | None, attribute: str, arguments: Sequence[float], algorithm: str
) -> Tensor:
    linear = compat.onednn_linear()
    if linear is None:
        raise NoPrimitiveError(_message(a.dtype))
    if a.dtype is torch.float32 and b.layout is torch.strided:
        if _by_columns(a) and _by_columns(b) and a.shape[1] >= _MANY_ROWS and bias is None and attribute == "none":
            return _by_blocks(linear, a, b)
        if _by_columns(b) and a.shape[0] >= _MANY_ROWS:
            b = b.contiguous()
    result: Tensor = linear(a, b, bias, attribute, list(arguments), algorithm)
    return result


def _by_columns(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 and matrix.stride(1) != 1


def _by_blocks(linear: private.OpOverload, a: Tensor, b: Tensor) -> Tensor:
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
