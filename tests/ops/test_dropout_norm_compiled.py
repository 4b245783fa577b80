"""What Inductor makes of the decomposition: the same mask and values, and each way one loop that hashes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fuse_pass import fuse_backend
from fuse_pass.numerics import random_bits
from fuse_pass.patterns import spellings
from tests.ops.gradients import run, wide
from tests.precision import assert_as_exact_as_eager

reference = spellings.dropout_norm.CORPUS.reference

SEED, P, EPS = 0x1234_5678_9ABC_DEF0, 0.3, 1e-5


def fused(values: dict[str, Any], norm: str = "layer_norm") -> Tensor:
    arguments = torch.tensor(SEED), P, EPS, 1, norm, None, False
    y: Tensor = torch.ops.fuse_pass.dropout_norm(*values.values(), *arguments)[0]
    return y


def by_reference(values: dict[str, Any]) -> Tensor:
    rows, columns = values["x"].shape
    keep = random_bits.keep_mask(torch.tensor(SEED), rows, columns, P)
    return reference(*values.values(), norm="layer_norm", eps=EPS, keep=keep, p=P)


def example(rows: int, columns: int, dtype: torch.dtype, mean: float = 0.0) -> dict[str, Any]:
    shapes = {"x": (rows, columns), "residual": (rows, columns), "weight": (columns,), "bias": (columns,)}
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    values["residual"] += mean
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "mean"),
    [
        (torch.float32, 9, 64, 0.0),
        (torch.bfloat16, 9, 64, 0.0),
        (torch.float32, 1, 33, 1e4),  # no multiple of a vector, and a mean that dwarfs the rest of the row
        (torch.bfloat16, 5, 17, 8.0),
        (torch.float32, 37, 40, 0.0),  # two blocks of rows and five rows more
    ],
)
def test_as_exact_as_eager(dtype: torch.dtype, rows: int, columns: int, mean: float) -> None:
    values = example(rows, columns, dtype, mean)
    result, eager = run(torch.compile(fused), values), run(by_reference, values)
    exact = run(by_reference, wide(values))
    for name, value in result.items():
        assert_as_exact_as_eager(value, eager[name], exact[name], name)
    dropped = ~random_bits.keep_mask(torch.tensor(SEED), rows, columns, P)
    assert torch.equal(result["x"] == 0, dropped)


def test_each_way_hashes_once() -> None:
    """Inductor would hash anew in each of the forward's three loops, which takes twice the time."""
    values = example(9, 64, torch.float32)
    with inductor_config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(lambda: run(torch.compile(fused), values))
    first, _, _ = random_bits._MULTIPLIERS
    assert [code.count(f"({first})") for code in codes] == [1, 1]


@pytest.mark.processor
def test_columns_are_computed_each_way_and_loaded_as_they_are() -> None:
    """Neither kept for backward, nor loaded as int32 with AVX2, where ATen writes a vector twice to load it."""

    def function(values: dict[str, Any]) -> Tensor:
        y: Tensor = F.layer_norm(F.dropout(values["x"], P) + values["residual"], (64,))
        return y

    values = example(9, 64, torch.float32)
    with inductor_config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(lambda: run(torch.compile(function, backend=fuse_backend), values))
    assert len(codes) == 2
    by_way_of_a_buffer = torch.backends.cpu.get_cpu_capability() == "AVX2"
    for code in codes:
        assert "Vectorized<int32_t>::arange(" in code
        assert ("Vectorized<int32_t>::loadu(out_ptr" in code) != by_way_of_a_buffer


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_all_steps_on_a_row_share_one_loop(norm: str) -> None:
    """A loop of its own for each step would be a pass over memory each."""
    rows = 9
    values = example(rows, 64, torch.float32)
    with inductor_config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(lambda: run(torch.compile(fused), values, norm))
    for code in codes:
        outer_loops = [line for line in code.splitlines() if "for(int64_t x0=" in line and f"({rows}L)" in line]
        assert len(outer_loops) == 1, outer_loops


@pytest.mark.parametrize("x_is_zero", [True, False])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_backward_leaves_the_residual_as_it_was(p: float, x_is_zero: bool) -> None:
    """With nothing left of x, the sum is the residual itself once Inductor has simplified it."""

    def function(x: Tensor, residual: Tensor) -> Tensor:
        x = torch.zeros_like(x) if x_is_zero else x
        y: Tensor = F.layer_norm(F.dropout(x, p) + residual, (24,))
        return y

    x, residual = torch.randn(6, 24, requires_grad=True), torch.randn(6, 24, requires_grad=True)
    before = residual.detach().clone()
    torch.compile(function, backend=fuse_backend)(x, residual).square().sum().backward()
    assert torch.equal(residual, before)
