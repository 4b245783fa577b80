"""Who takes part: what is computed, where, and what is said of those who do not."""

from __future__ import annotations

import math

import pytest
import torch

from fuse_pass.bench.against import accuracy
from fuse_pass.bench.against.contender import FLOAT, INT4_WEIGHT_ONLY, INT8, INT8_WEIGHT_ONLY, Contender
from fuse_pass.bench.against.entries import Entries, entries
from fuse_pass.bench.against.torch_dynamic import TORCH_DYNAMIC
from tests.bench.against import fakes


def entered(contender: Contender, kind: str = FLOAT, dtype: torch.dtype = torch.float32, threads: int = 1) -> Entries:
    asked = fakes.task(kind, dtype, threads)
    return entries([contender], asked, accuracy.in_float64(asked), lambda word: None)


def reason(contender: Contender, kind: str = FLOAT) -> str:
    found = entered(contender, kind)
    assert found.calls == {}
    assert found.errors == {}
    return found.absent[contender.name]


def test_the_error_is_that_against_float64() -> None:
    found = entered(fakes.INT8_OF_1_PERCENT, INT8)
    assert found.absent == {}
    assert found.errors["fake"] == pytest.approx(0.01, rel=1e-3)
    assert found.calls["fake"]().shape == (fakes.ROWS, fakes.DIM)
    exact = entered(fakes.contender(fakes.as_it_is))
    assert 0 < exact.errors["fake"] < 1e-6, "that of float32"


def test_bfloat16_may_be_less_exact() -> None:
    assert 1e-3 < entered(fakes.contender(fakes.as_it_is), dtype=torch.bfloat16).errors["fake"] < 1e-2


@pytest.mark.parametrize("share", [0.5, math.nan, math.inf])
def test_who_computes_something_else_is_not_compared(share: float) -> None:
    said = reason(fakes.contender(fakes.off_by(share)))
    assert said.startswith("computes something else: its relative error against float64 is ")


def test_part_of_the_results_is_something_else() -> None:
    said = reason(fakes.contender(fakes.first_row_only))
    assert said == "computes something else: results of shapes [(1, 24)], where [(5, 24)] were expected"


@pytest.mark.parametrize("kind", [INT8, INT8_WEIGHT_ONLY, INT4_WEIGHT_ONLY])
def test_who_quantizes_nothing_is_not_compared(kind: str) -> None:
    """ONNX Runtime's 4-bit tool passes by layers that it does not know, and says nothing."""
    said = reason(fakes.contender(fakes.as_it_is, kind), kind)
    assert said.startswith("quantised nothing: its relative error against float64 is ")
    assert said.endswith(f"too small for {kind}")


def test_who_uses_other_threads_is_not_compared() -> None:
    said = reason(fakes.contender(fakes.in_another_thread))
    assert said.startswith("computes ")
    assert said.endswith("% in other threads, although it was told to use one")
    assert entered(fakes.contender(fakes.in_another_thread), threads=2).absent == {}


def test_a_failure_is_said_in_a_line_and_the_others_go_on() -> None:
    asked = fakes.task()
    words: list[str] = []
    both = [fakes.contender(fakes.failing, name="broken"), fakes.contender(fakes.as_it_is)]
    found = entries(both, asked, accuracy.in_float64(asked), words.append)
    assert list(found.calls) == ["fake"]
    assert found.absent == {"broken": "RuntimeError: no kernel for this"}
    assert words == ["broken not (RuntimeError: no kernel for this)", "fake"]


def test_arithmetic_that_it_does_not_have() -> None:
    assert reason(fakes.contender(fakes.as_it_is), INT8) == "has nothing for int8"


def test_torch_dynamic_has_int8_and_leaves_the_model_alone() -> None:
    asked = fakes.task(INT8)
    before = {name: value.clone() for name, value in asked.example.model.state_dict().items()}
    found = entries([TORCH_DYNAMIC], asked, accuracy.in_float64(asked), lambda word: None)
    assert 1e-3 < found.errors["torch_dynamic"] < 0.1
    assert all(torch.equal(value, before[name]) for name, value in asked.example.model.state_dict().items())
