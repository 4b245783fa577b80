"""Eager's own error, from which bounds are made."""

from __future__ import annotations

import math

import pytest
import torch

from fuse_pass.testing.differences import differences, noise_of
from fuse_pass.testing.observe import Round


def run(*values: float, dtype: torch.dtype = torch.float32) -> list[Round]:
    return [Round((torch.tensor(values, dtype=dtype),), {}, (), (False,), {}, frozenset(), False, False)]


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_noise_is_that_of_finite_elements(special: float) -> None:
    pairs = [
        (run(1.0, -8.25, special), run(1.0, -8.0, special, dtype=torch.float64)),
        (run(2.5, special, 5.0), run(2.0, special, 4.0, dtype=torch.float64)),
        (run(special), run(special, dtype=torch.float64)),
    ]
    assert noise_of(pairs) == {"output 0": 0.25}


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("ours", "eager", "exact", "is_found"),
    [
        pytest.param(INF, NAN, 1e50, False, id="an overflow that eager makes NaN of"),
        pytest.param(-INF, INF, -1e50, False, id="an overflow of a partial sum"),
        pytest.param(INF, NAN, 1.0, True, id="an infinity for a small number"),
        pytest.param(NAN, 1.0, 1.0, True, id="NaN for a number"),
        pytest.param(NAN, 3e38, 1e50, True, id="NaN where eager has a number"),
        pytest.param(1.0, NAN, 1.0, False, id="the number where eager has none"),
        pytest.param(NAN, INF, INF, True, id="NaN for an infinity"),
    ],
)
def test_positions_of_infinities(ours: float, eager: float, exact: float, is_found: bool) -> None:
    runs = run(ours, 1.0), run(eager, 1.0), run(exact, 1.0, dtype=torch.float64)
    assert bool(list(differences(*runs))) == is_found


@pytest.mark.parametrize(("ours", "noise", "is_found"), [(1.3, 0.1, True), (3.0, 0.6, False), (30.0, 0.6, True)])
def test_where_eager_has_no_right_digit(ours: float, noise: float, is_found: bool) -> None:
    """The bound is wider there, and still one."""
    runs = run(ours), run(1.0), run(1.0, dtype=torch.float64)
    assert bool(list(differences(*runs, {"output 0": noise}))) == is_found
