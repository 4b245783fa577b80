"""The table of providers: who is chosen for which product."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fuse_pass.gemm import integers, measured, onednn, probe
from fuse_pass.gemm.problem import GemmProblem
from fuse_pass.gemm.providers import PROVIDERS, IntegerSums, best
from fuse_pass.inductor import compat

CPU = torch.device("cpu")
BREAK_EVEN = 4 * probe.MIN_FLOP
LARGE, MEDIUM, SMALL = (512, 256, 256), (100, 100, 100), (10, 10, 10)
UNKNOWN = (None, None, None)
pytestmark = [
    pytest.mark.processor,
    pytest.mark.skipif(compat.onednn_linear() is None, reason="this build of PyTorch lacks oneDNN"),
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """How often the table was asked for; it has a verdict on plain float32 products."""
    found: list[None] = []

    def table() -> dict[str, int]:
        found.append(None)
        return {"float32": BREAK_EVEN}

    monkeypatch.setattr(measured, "table", table)
    return found


def chosen(dtype: torch.dtype, sizes: tuple[int | None, int | None, int | None], **about: Any) -> str:
    """Outside of graphs, where no sums are chosen."""
    return best(GemmProblem(about.pop("device", CPU), dtype, sizes, in_graph=False, **about)).name


def test_bfloat16_through_float32_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the weight is converted for a few rows, nor for a few numbers, nor where there is such arithmetic."""
    monkeypatch.setattr(measured, "table", dict)
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: False)
    few, many = (4, 768, 3072), (16, 768, 3072)
    assert chosen(torch.bfloat16, few) == "aten"
    assert chosen(torch.bfloat16, many) == "via_float32"
    assert chosen(torch.bfloat16, UNKNOWN) == "via_float32"
    assert chosen(torch.bfloat16, few, column_major=True) == "via_float32"
    assert chosen(torch.bfloat16, few, both_transposed=True) == "via_float32"
    assert chosen(torch.bfloat16, SMALL, both_transposed=True) == "aten"
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: True)
    assert chosen(torch.bfloat16, many) == "aten"


def test_every_row_has_a_name_of_its_own() -> None:
    names = [provider.name for provider in PROVIDERS]
    assert len(set(names)) == len(names)


def test_a_dtype_that_onednn_does_not_multiply_is_not_sent_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the table says."""
    everything = {question.name: probe.MIN_FLOP for question in probe.QUESTIONS}
    monkeypatch.setattr(measured, "table", lambda: everything)
    constant = (16, 1024, 1024)
    for has in (True, False):
        monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype, has=has: has)
        assert chosen(torch.bfloat16, LARGE) == ("onednn" if has else "via_float32")
        assert chosen(torch.bfloat16, LARGE, activation="gelu") == ("onednn+activation" if has else "via_float32")
        assert chosen(torch.bfloat16, constant, is_constant=True) == ("packed" if has else "via_float32")
        assert chosen(torch.float32, LARGE) == "onednn"
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: True)
    monkeypatch.setattr(onednn, "_failed", {torch.bfloat16, torch.float32})
    for dtype in (torch.bfloat16, torch.float32):
        assert chosen(dtype, LARGE) == "aten"
        assert chosen(dtype, constant, is_constant=True) == "aten"


def test_small_products_stay_with_aten(asked: list[None]) -> None:
    assert chosen(torch.float32, SMALL) == "aten"
    assert not asked, "below MIN_FLOP nobody asks the probe"
    assert 2 * math.prod(MEDIUM) < BREAK_EVEN <= 2 * math.prod(LARGE)
    assert chosen(torch.float32, MEDIUM) == "aten"
    assert chosen(torch.float32, LARGE) == "onednn"
    assert chosen(torch.float32, UNKNOWN) == "onednn"
    assert chosen(torch.float32, (None, 8, 8)) == "onednn", "an unknown size is taken as large"


def test_thin_products_stay_with_aten(asked: list[None]) -> None:
    many = 1_000_000
    assert chosen(torch.float32, (many, 3, many)) == "aten"
    assert chosen(torch.float32, (many, many, 1)) == "aten", "an outer product"
    assert chosen(torch.float32, (None, None, 1)) == "aten"
    assert chosen(torch.float32, (2, many, many)) == "aten"
    assert chosen(torch.float32, (3, many, many)) == "onednn"
    narrow = (many, 63, many)
    assert chosen(torch.float32, narrow) == "onednn"
    assert chosen(torch.float32, narrow, both_transposed=True) == "aten"


def test_verdicts_are_per_dtype_and_epilogue(asked: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: True)
    assert chosen(torch.float32, LARGE, activation="gelu") == "onednn", "the activation by itself"
    for dtype in (torch.float64, torch.bfloat16):
        assert chosen(dtype, LARGE) == "aten"
    monkeypatch.setattr(measured, "table", lambda: {"float32+activation": probe.MIN_FLOP})
    assert chosen(torch.float32, LARGE) == "aten"
    assert chosen(torch.float32, LARGE, activation="gelu") == "onednn+activation"
    assert chosen(torch.float32, LARGE, activation="mish") == "aten", "the library has none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_devices_stay_with_aten(dtype: torch.dtype, asked: list[None]) -> None:
    for device in ("cuda", "meta", "mps"):
        assert chosen(dtype, LARGE, device=torch.device(device)) == "aten"
    assert not asked


@pytest.mark.parametrize("sizes", [UNKNOWN, SMALL, LARGE])
def test_float16_without_hardware_never_reaches_the_scalar_loop(
    sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, asked: list[None]
) -> None:
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: False)
    assert chosen(torch.float16, sizes) == "via_float32"
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: True)
    assert chosen(torch.float16, sizes) == "aten"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_in_graphs_a_few_rows_of_half_types_are_sums_without_hardware(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which read the weight as it is; through float32 all of it is converted first, in every call."""
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: False)
    monkeypatch.setattr(compat, "has_vector_loops", lambda: True)
    for column_major in (False, True):
        assert best(GemmProblem(CPU, dtype, (rows, 768, 3072), column_major=column_major)).name == "sums"


@pytest.mark.parametrize("exact", [True, False])
def test_integers_are_multiplied_where_that_is_exact(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "cpu_int_mm_is_exact", lambda: exact)
    assert chosen(torch.int8, LARGE) == ("int_mm" if exact else "integers_in_float32")
    assert chosen(torch.int8, (512, 256, 1)) == "integers_in_float32"
    cuda = torch.device("cuda")
    assert chosen(torch.int8, LARGE, device=cuda) == "int_mm"
    assert chosen(torch.int8, (16, 256, 256), device=cuda) == "integers_in_float32", "cuBLAS takes more rows only"


def test_what_nobody_multiplies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuse_pass.gemm.providers.PROVIDERS", ())
    with pytest.raises(ValueError, match=r"expected a product of .* int8 matrices, got .*torch\.float32"):
        chosen(torch.float32, LARGE)


@pytest.mark.parametrize(("rows", "expected"), [(1, "integer_sums"), (4, "integer_sums"), (5, "integers_in_float32")])
def test_few_rows_of_integers_on_a_gpu_are_summed_in_a_loop(rows: int, expected: str) -> None:
    """Of a graph: run one by one, the calls would store every product."""
    gpu, sizes = torch.device("cuda"), (rows, 64, 64)
    assert best(GemmProblem(gpu, torch.int8, sizes)).name == expected
    assert best(GemmProblem(gpu, torch.int8, sizes, in_graph=False)).name == "integers_in_float32"
    assert best(GemmProblem(gpu, torch.int8, (8192, 64, 64))).name == "int_mm"


def test_integer_sums_are_exact() -> None:
    a, b = (torch.randint(-127, 128, (rows, 4099), dtype=torch.int8) for rows in (4, 7))
    a[0], b[0] = 127, -127
    sums = IntegerSums().run(a, b, None, None)
    assert sums.dtype is torch.int32
    assert torch.equal(sums.long(), a.long() @ b.long().t())
