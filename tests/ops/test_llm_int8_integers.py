"""The integers of LLM.int8: the steps that rows are rounded to, and their exact product."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fuse_pass.inductor import compat
from fuse_pass.ops.llm_int8 import quantize_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_of_half_types_are_exact_ties_included(dtype: torch.dtype) -> None:
    """All pairs of a value and a row maximum in [1, 2), against integers: round(127 · n / m) to even."""
    count = int(1 / torch.finfo(dtype).eps)
    n = torch.arange(count)
    m = torch.arange(count, 2 * count)[:: max(1, count // 128)]
    rows = torch.cat([n.expand(len(m), -1), m[:, None]], 1)
    double, twice = 254 * rows, 2 * m[:, None]
    floor = double // twice
    rest = double - floor * twice
    expected = floor + ((rest * 2 > twice) | ((rest * 2 == twice) & (floor % 2 == 1)))
    steps, _ = quantize_rows((rows / count).to(dtype))
    assert torch.equal(steps.long(), expected)


def test_steps_and_scales() -> None:
    steps = torch.randint(-127, 128, (5, 40))
    steps[:, 7] = torch.tensor([127, -127, 127, 127, -127])
    scale = torch.tensor([2.0**-140, 0.5, 1.0, 3.0, 2.0**120])
    found, found_scale = quantize_rows(steps * scale[:, None])
    assert found.dtype is torch.int8
    assert torch.equal(found.long(), steps)
    assert torch.equal(found_scale, scale)


def test_rows_that_no_scale_can_hold() -> None:
    matrix = torch.tensor([[0.0, -0.0, 0.0], [1.0, float("nan"), 2.0], [1.0, float("-inf"), 2.0], [3e38, -1e38, 0.0]])
    steps, scale = quantize_rows(matrix)
    assert steps.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [127, -42, 0]]
    torch.testing.assert_close(
        scale, torch.tensor([0.0, float("nan"), float("inf"), 3e38 / 127]), equal_nan=True, rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("path", ["library", "float32"])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 7, 5), (0, 8, 8), (17, 1025, 9), (2, 5000, 3), (33, 64, 24)])
def test_integer_product_is_exact(path: str, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "float32":
        monkeypatch.setattr(compat, "int_mm", lambda: None)
    m, k, n = size
    a, b = torch.randint(-128, 128, (m, k)).to(torch.int8), torch.randint(-128, 128, (n, k)).to(torch.int8)
    for sign in (1, -1):
        a[:1], b[:1] = -128, 127 if sign > 0 else -128
        product = torch.ops.fuse_pass.int8_product(a, b)
        assert product.dtype is torch.int32
        assert torch.equal(product.long(), a.long() @ b.long().t())


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_integer_product_is_exact_where_the_library_saturates(isa: str) -> None:
    """oneDNN's int8 product is wrong without VNNI instructions."""
    code = (
        "import torch, fuse_pass\n"
        "a, b = torch.full((20, 64), 127, dtype=torch.int8), torch.full((24, 64), -127, dtype=torch.int8)\n"
        "assert (torch.ops.fuse_pass.int8_product(a, b) == -64 * 127 * 127).all()"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("columns", [1, 2, 16])
def test_small_products_are_exact(rows: int, k: int, columns: int) -> None:
    a, b = (torch.randint(-127, 128, (n, k), dtype=torch.int8) for n in (rows, columns))
    assert torch.equal(torch.ops.fuse_pass.int8_product(a, b), a.int() @ b.int().T)
