"""CUDA graphs can be made of what is generated, and a seed is drawn once for forward and backward."""

from __future__ import annotations

from typing import Any

import pytest

GROUP = "graphs"
every_case = pytest.mark.parametrize(
    "case", ["dropout_norm", "mlp", "swiglu", "bit_linear", pytest.param("bert autocast", marks=pytest.mark.slow)]
)
DRAWING = {"dropout_norm", "mlp", "bert autocast"}


@every_case
def test_nothing_stands_against_cuda_graphs(case: str, result: Any) -> None:
    assert result["graphs"] == 2
    assert result["obstacles"] == [[], []]


@every_case
def test_seeds_are_drawn_once_whatever_the_memory_budget(case: str, result: Any) -> None:
    once = [1, 0] if case in DRAWING else [0, 0]
    assert result["draws"] == {"1.0": once, "0.5": once, "0.0": once}
