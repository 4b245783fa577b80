"""Eager's own error, from which bounds are made."""

from __future__ import annotations

import math

import pytest
import torch

from fuse_pass.testing.differences import noise_of
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
