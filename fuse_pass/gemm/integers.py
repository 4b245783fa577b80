"""Products of int8 matrices with sums in int32: where PyTorch's own is exact."""

from __future__ import annotations

import functools

import torch

from fuse_pass.gemm.probe import quiet
from fuse_pass.gemm.problem import GemmProblem
from fuse_pass.inductor import compat
from fuse_pass.numerics.formats import IntFormat

QMAX = IntFormat(8).quant_max
# The largest inner sizes at which no sum of products of int8 values (2^14 at most) leaves what float32 and int32 hold.
MAX_EXACT_FLOAT32 = 2**24 // 2**14
MAX_EXACT_INT32 = (2**31 - 1) // 2**14


def int_mm_serves(problem: GemmProblem) -> bool:
    """Whether `torch._int_mm` computes this, exactly."""
    if compat.int_mm() is None:
        return False
    rows, columns, inner = problem.sizes
    if rows is None or columns is None or inner is None:
        return False
    if problem.device.type == "cuda":  # what cuBLAS asks of an int8 product
        return bool(rows > 16 and inner > 0 and inner % 8 == 0 and columns % 8 == 0)
    # With k = 1 the strides of the transposed b tell a row from a column no more, and the CPU takes the wrong one.
    return problem.device.type == "cpu" and bool(inner > 1) and cpu_int_mm_is_exact()


@functools.cache
def cpu_int_mm_is_exact() -> bool:
    """Whether oneDNN's int8 product is right on this machine.

    Without VNNI instructions it adds pairs of products in saturating int16: 64 products 127 · 127 then give 8160
    instead of 1032256 (measured with ONEDNN_MAX_CPU_ISA=AVX512_CORE). Without oneDNN it is a scalar loop.
    """
    int_mm = compat.int_mm()
    if int_mm is None or not torch.backends.mkldnn.is_available():
        return False
    with quiet():
        for rows in (1, 20):
            for sign in (1, -1):
                a = torch.full((rows, 64), QMAX, dtype=torch.int8)
                b = torch.full((24, 64), sign * QMAX, dtype=torch.int8)
                if not bool((int_mm(a, b.t()) == sign * 64 * QMAX**2).all()):
                    return False
    return True
