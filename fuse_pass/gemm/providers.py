"""Who computes matrix products: one row for each way, with what it can do, what it costs, and how it is called.

Costs are relative: 1 is PyTorch's own product of the same problem, `aten`. The best row of a problem is the cheapest
that supports it, of equal ones the first in `PROVIDERS`.

An activation that a row does not compute in the same call is one more pass over the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fuse_pass.gemm import integers, measured, onednn, probe
from fuse_pass.gemm.probe import Kind
from fuse_pass.gemm.problem import Epilogue, GemmProblem
from fuse_pass.inductor import compat
from fuse_pass.inductor.reach import Reach, reach
from fuse_pass.numerics.tensors import accumulation_dtype

_OWN = 1.0
# One more pass over the result, for the activation.
_PASS = 0.1

# Thin products are as fast with aten at any size (AMD Zen 5): an outer product and a result of one to three columns
# took oneDNN up to six times as long, one or two rows up to 1.6 times, a weight gradient of less than 64 columns up to
# 1.5 times (it transposes both operands first).
_MIN_ROWS, _MIN_COLUMNS, _MIN_COLUMNS_OF_GRADIENT, _MIN_INNER = 3, 4, 64, 2

# Rows up to which sums are faster. Two and more pay from so many elements of b on; a single row always does, but for
# sizes that Inductor knows itself.
_MAX_ROWS_OF_SUMS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
_MIN_ELEMENTS_OF_SUMS = 1 << 14
_DECOMPOSED_BY_INDUCTOR = 16
# As many as share one reading of b in the code that Inductor generates for a GPU, by what it moves; not measured.
_MAX_ROWS_OF_INTEGER_SUMS = 4

# Rows from which converting a `[columns, inner]` bfloat16 weight to float32 pays. On an AMD Zen 3 it is 5 (16 take a
# third of the time); a busy Xeon that was told to use AVX2 alone lost 17 to 45 % at 16 and was even at 32.
_MIN_ROWS_VIA_FLOAT32 = 16
# Sums, where there are so few rows that they serve, read a weight of half the size and convert it on the way.
_VIA_FLOAT32 = 0.7

# Elements of a weight from which a packed copy saves more than it takes to see that the weight has not changed (30 us).
_MIN_ELEMENTS_PACKED = 1 << 19
# Rows up to which packing a plain weight costs more than its arithmetic.
_FEW_ROWS = 64


class Provider(Protocol):
    """One way of computing a product.

    Attributes:
        name: for reports and tables.
        computes_activation: whether the activation is part of the same kernel.
        reach: where a graph runs that it has been written into.
    """

    name: str
    computes_activation: bool
    reach: Reach

    def supports(self, problem: GemmProblem) -> bool:
        """Whether it can compute this, here, as exactly as PyTorch does."""

    def cost(self, problem: GemmProblem) -> float:
        """Expected time, as a multiple of PyTorch's own product; asked only where it supports the problem."""

    def run(self, a: Tensor, b: Tensor, bias: Tensor | None, epilogue: Epilogue | None) -> Tensor:
        """`epilogue(a @ b.T + bias)`."""


class Aten:
    """PyTorch's own product; Inductor knows how to fuse and tune it."""

    name, computes_activation = "aten", False
    reach = Reach.ANYWHERE

    def supports(self, problem: GemmProblem) -> bool:
        return problem.dtype is not torch.int8

    def cost(self, problem: GemmProblem) -> float:
        return _OWN + _pass_of(problem)

    def run(self, a: Tensor, b: Tensor, bias: Tensor | None, epilogue: Epilogue | None) -> Tensor:
        return _followed_by(epilogue, torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t()))


class Sums:
    """One sum per row and column, in a loop over the rows of b that Inductor generates; the activation joins it.

    With up to four rows no library reads the weight as fast as memory gives it (768 x 3072, AMD Zen 5, torch 2.13: one
    row 99 us against 137 in float32 and 102 against 158 in bfloat16, four rows 157 against 276 by oneDNN and 404 by
    MKL). Run one by one, the calls would store every product before it is summed, so that it is for graphs only.
    """

    name, computes_activation = "sums", True
    reach = Reach.PACKAGE

    def supports(self, problem: GemmProblem) -> bool:
        rows, _, _ = problem.sizes
        if problem.device.type != "cpu" or not problem.in_graph or problem.both_transposed or not problem.is_dense:
            return False
        if not isinstance(rows, int) or not 1 <= rows <= _MAX_ROWS_OF_SUMS.get(problem.dtype, 0):
            return False
        return not (problem.column_major and problem.dtype is torch.float32) and compat.has_vector_loops()

    def cost(self, problem: GemmProblem) -> float:
        rows, columns, inner = problem.sizes
        known = [size for size in (columns, inner) if isinstance(size, int)]
        if rows == 1:
            is_column = isinstance(columns, int) and columns == 1
            return 0.4 if max(known, default=1) > _DECOMPOSED_BY_INDUCTOR and not is_column else math.inf
        return 0.6 if len(known) < 2 or math.prod(known) >= _MIN_ELEMENTS_OF_SUMS else math.inf

    def run(self, a: Tensor, b: Tensor, bias: Tensor | None, epilogue: Epilogue | None) -> Tensor:
        wide = accumulation_dtype(a.dtype)
        # Stored, or what computes a would be computed anew for every column.
        rows = compat.stored_once(a.contiguous()).to(wide).unbind(0)
        y = torch.stack([(row * b.to(wide)).sum(-1) for row in rows])
        return _followed_by(epilogue, (y if bias is None else y + bias.to(wide)).to(a.dtype))


class OneDNN:
    """oneDNN's linear on plain operands, where it was measured to be faster.

    Args:
        with_activation: in the same call.
    """

    reach = Reach.HERE

    def __init__(self, *, with_activation: bool = False) -> None:
        self.computes_activation = with_activation
        self.name = "onednn+activation" if with_activation else "onednn"

    def supports(self, problem: GemmProblem) -> bool:
        if problem.device.type != "cpu" or (self.computes_activation and problem.fused_activation is None):
            return False
        return onednn.multiplies(problem.dtype)

    def cost(self, problem: GemmProblem) -> float:
        flop = problem.flop
        if _is_thin(*problem.hints, of_gradient=problem.both_transposed):
            return math.inf
        if flop is not None and flop < probe.MIN_FLOP:
            return math.inf
        # What is measured for bfloat16 may be that the activation pays and the product alone does not.
        kind = Kind.WITH_ACTIVATION if self.computes_activation else Kind.PLAIN
        break_even = measured.table().get(measured.name(problem.dtype, kind))
        if break_even is None or (flop is not None and flop < break_even):
            return math.inf
        if self.computes_activation:
            return _OWN / probe.MIN_GAIN_WITH_ACTIVATION
        return _OWN / probe.MIN_GAIN + _pass_of(problem)

    def run(self, a: Tensor, b: Tensor, bias: Tensor | None, epilogue: Epilogue | None) -> Tensor:
        return _by_onednn(torch.ops.fuse_pass.gemm, (a, b, bias), epilogue, fused=self.computes_activation)


class Packed:
    """oneDNN's linear on a weight that was packed once; what packing takes is saved in every call.

    Args:
        with_activation: in the same call.
    """

    reach = Reach.HERE

    def __init__(self, *, with_activation: bool = False) -> None:
        self.computes_activation = with_activation
        self.name = "packed+activation" if with_activation else "packed"

    def supports(self, problem: GemmProblem) -> bool:
        if problem.device.type != "cpu" or not problem.is_constant or problem.dtype is torch.float16:
            return False
        if self.computes_activation and problem.fused_activation is None:
            return False
        return onednn.multiplies(problem.dtype)

    def cost(self, problem: GemmProblem) -> float:
        rows, columns, inner = problem.hints
        if columns is None or inner is None or columns * inner < _MIN_ELEMENTS_PACKED:
            return math.inf
        is_single = isinstance(problem.sizes[0], int) and rows == 1  # which reads the weight once, in any order
        if is_single or _is_thin(None, columns, inner):
            return math.inf
        kind = Kind.PACKED_MANY_ROWS if rows is None or rows > _FEW_ROWS else Kind.PACKED_FEW_ROWS
        if measured.name(problem.dtype, kind) not in measured.table():
            return math.inf
        return 0.5 + (0.0 if self.computes_activation else _pass_of(problem))

    def run(self, a: Tensor, b: Tensor, bias: Tensor | None, epilogue: Epilogue | None) -> Tensor:
        return _by_onednn(torch.ops.fuse_pass.gemm_prepacked, (a, b, bias), epilogue, fused=self.computes_activation)


class ViaFloat32:
    """A half type that this CPU does not multiply, through float32: sums in float32, and one rounding of the result.

    For float16 aten falls to a scalar loop. In bfloat16 it multiplies row by row at 10 Gflop/s where both operands are
    stored along the sums, and more slowly where they are not, as in both gradients (512 x 768 x 3072, an Xeon that was
    told to use AVX2 alone: 197 ms forward, 2987 and 457 ms the gradients, against 104, 104 and 90 through float32).
    """

    name, computes_activation = "via_float32", False
    reach = Reach.ANYWHERE

    def supports(self, problem: GemmProblem) -> bool:
        is_half = problem.dtype in (torch.float16, torch.bfloat16)
        return problem.device.type == "cpu" and is_half and not compat.has_fast_cpu_dtype(problem.dtype)

    def cost(self, problem: GemmProblem) -> float:
        cost = _VIA_FLOAT32 + _pass_of(problem)
        if problem.dtype is torch.float16:
            return cost
        if problem.flop is not None and problem.flop < probe.MIN_FLOP:
            return math.inf
        rows, _, _ = problem.hints
        is_worth_it = rows is None or rows >= _MIN_ROWS_VIA_FLOAT32
        return cost if is_worth_it or problem.both_transposed or problem.column_major else math.inf

    def run(self, a: Tensor, b: Tensor, bias: Tensor | None, epilogue: Epilogue | None) -> Tensor:
        wide = a.float(), b.float()
        y = best(GemmProblem.of(*wide)).run(*wide, None if bias is None else bias.float(), None)
        return _followed_by(epilogue, y.to(a.dtype))


class IntMM:
    """PyTorch's `int8 @ int8 → int32`, where it is exact; elsewhere it does not exist."""

    name, computes_activation = "int_mm", False
    reach = Reach.HERE  # exact on some processors only

    def supports(self, problem: GemmProblem) -> bool:
        return problem.dtype is torch.int8 and integers.int_mm_serves(problem)

    def cost(self, problem: GemmProblem) -> float:
        return _OWN

    def run(self, a: Tensor, b: Tensor, bias: Tensor | None, epilogue: Epilogue | None) -> Tensor:
        int_mm = compat.int_mm()
        assert int_mm is not None  # `supports` has looked
        return int_mm(a.contiguous(), b.contiguous().t())


class IntegerSums:
    """int8 products of a few rows on a GPU, one sum per row and column in a loop that Inductor generates.

    cuBLAS has none for up to 16 rows. What makes b of a packed weight joins the loop, which so reads the packed one.
    """

    name, computes_activation = "integer_sums", False
    reach = Reach.PACKAGE

    def supports(self, problem: GemmProblem) -> bool:
        rows = problem.sizes[0]
        if problem.device.type == "cpu" or problem.dtype is not torch.int8 or not problem.in_graph:
            return False
        return isinstance(rows, int) and 1 <= rows <= _MAX_ROWS_OF_INTEGER_SUMS

    def cost(self, problem: GemmProblem) -> float:
        return 0.5 * _OWN

    def run(self, a: Tensor, b: Tensor, bias: Tensor | None, epilogue: Epilogue | None) -> Tensor:
        # Stored, or what computes a would be computed anew for every column.
        rows = compat.stored_once(a.contiguous()).to(torch.int32).unbind(0)
        return torch.stack([(row * b.to(torch.int32)).sum(-1, dtype=torch.int32) for row in rows])


class IntegersInFloat32:
    """int8 products by sums that float32 holds exactly; so do TF32 and bfloat16, whose significands hold every int8."""

    name, computes_activation = "integers_in_float32", False
    reach = Reach.ANYWHERE

    def supports(self, problem: GemmProblem) -> bool:
        return problem.dtype is torch.int8

    def cost(self, problem: GemmProblem) -> float:
        return 4 * _OWN

    def run(self, a: Tensor, b: Tensor, bias: Tensor | None, epilogue: Epilogue | None) -> Tensor:
        parts = zip(a.split(integers.MAX_EXACT_FLOAT32, 1), b.split(integers.MAX_EXACT_FLOAT32, 1), strict=True)
        wide = ((a_part.float(), b_part.float()) for a_part, b_part in parts)
        sums = (best(GemmProblem.of(*pair)).run(*pair, None, None).to(torch.int32) for pair in wide)
        return functools.reduce(torch.add, sums)


PROVIDERS: tuple[Provider, ...] = (
    Aten(),
    Sums(),
    OneDNN(with_activation=True),
    OneDNN(),
    Packed(with_activation=True),
    Packed(),
    ViaFloat32(),
    IntMM(),
    IntegerSums(),
    IntegersInFloat32(),
)


def best(problem: GemmProblem) -> Provider:
    """The cheapest row that supports a problem, of those that go as far as what is traced now.

    Raises:
        ValueError: none does.
    """
    least = reach()
    able = [provider for provider in PROVIDERS if provider.reach >= least and provider.supports(problem)]
    if not able:
        raise ValueError(f"expected a product of floating-point or int8 matrices, got {problem}")
    return min(able, key=lambda provider: provider.cost(problem))


def _is_thin(rows: int | None, columns: int | None, inner: int | None, *, of_gradient: bool = False) -> bool:
    if rows is not None and rows < _MIN_ROWS:
        return True
    min_columns = _MIN_COLUMNS_OF_GRADIENT if of_gradient else _MIN_COLUMNS
    return (columns is not None and columns < min_columns) or (inner is not None and inner < _MIN_INNER)


def _pass_of(problem: GemmProblem) -> float:
    return _PASS if problem.activation else 0.0


def _followed_by(epilogue: Epilogue | None, y: Tensor) -> Tensor:
    return y if epilogue is None else epilogue(y)


def _by_onednn(
    op: Callable[..., Tensor],
    operands: tuple[Tensor, Tensor, Tensor | None],
    epilogue: Epilogue | None,
    *,
    fused: bool,
) -> Tensor:
    if not fused or epilogue is None:
        return _followed_by(epilogue, op(*operands, "none", [], ""))
    assert epilogue.row.post_op is not None  # `supports` has looked
    attribute, algorithm = epilogue.row.post_op
    return op(*operands, attribute, list(epilogue.arguments), algorithm)
