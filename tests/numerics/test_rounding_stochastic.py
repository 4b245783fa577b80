"""Stochastic rounding: only the two neighbours, exact values fixed, the right probabilities, seeds that matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fuse_pass.numerics.formats import FixedFormat, FloatFormat, Format, formats
from fuse_pass.quantization.functional import fake_quantize
from tests.numerics.test_rounding import FORMATS, critical, quantize, table

MODES = ("stoc_prop", "stoc_equal")
TRIALS = 2**16
# 16 fractions, 2 modes, 2 dtypes, 4 places: 256 tests. Each fails by chance once in a million.
LEAST_P = 1e-6
FRACTIONS = [i / 16 + 1 / 32 for i in range(16)]
# format and a number of it with its upper neighbour: a normal pair, a subnormal one, the one above zero, a large one
PLACES = {
    "normal": (FloatFormat(4, 3), 1.0, 1.125, True),
    "subnormal": (FloatFormat(4, 3), 2**-8, 3 * 2**-9, True),
    "above zero": (FloatFormat(4, 3), 0.0, 2**-9, True),
    "above zero without subnormals": (FloatFormat(4, 3), 0.0, 2**-6, False),
    "subnormal of the carrier": (FloatFormat(8, 1), 2.0**-127, 2.0**-126, True),
}


def seed_of(value: int) -> Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
def test_probability_of_going_up(mode: str, place: str, dtype: torch.dtype) -> None:
    fmt, low, high, subnormal = PLACES[place]
    for number, fraction in enumerate(FRACTIONS):
        x = torch.full((TRIALS,), low + fraction * (high - low), dtype=dtype)
        y = quantize(x, fmt, mode, subnormal=subnormal, seed=seed_of(1000 + number))
        up = int((y == high).sum())
        assert up + int((y == low).sum()) == TRIALS
        expected = fraction if mode == "stoc_prop" else 0.5
        assert stats.binomtest(up, TRIALS, expected).pvalue > LEAST_P, f"fraction {fraction}: {up / TRIALS}"


@pytest.mark.parametrize("mode", MODES)
def test_mirrored_for_negative_numbers(mode: str) -> None:
    x = torch.randn(5000)
    for fmt in FORMATS[:6]:
        assert torch.equal(quantize(-x, fmt, mode, seed=seed_of(3)), -quantize(x, fmt, mode, seed=seed_of(3)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.bits < 17], ids=lambda fmt: fmt.name)
def test_only_neighbours_and_exact_values_stay(fmt: FloatFormat, dtype: type[np.floating]) -> None:
    values = critical(fmt, dtype)
    x = torch.from_numpy(values[np.isfinite(values)])
    for subnormal in (True, False):
        down, up = (quantize(x, fmt, way, subnormal=subnormal) for way in ("minus_inf", "plus_inf"))
        for mode in MODES:
            y = quantize(x, fmt, mode, subnormal=subnormal, seed=seed_of(5))
            # Beyond the largest number, too, there are two: itself, and what overflow gives.
            beyond = x.abs() > fmt.max
            assert ((y == down) | (y == up) | beyond).all()
            assert ((y.abs() == fmt.max) | ~y.isfinite())[beyond].all()
            exact = (down == x) & (up == x)
            assert torch.equal(y[exact], x[exact])


def test_zeros_infinities_and_nan_stay() -> None:
    x = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    for mode in MODES:
        for seed in range(20):
            y = quantize(x, FloatFormat(4, 3), mode, seed=seed_of(seed))
            assert torch.equal(y.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("mode", MODES)
def test_seeds_differ_and_repeat(mode: str) -> None:
    x = torch.randn(50, 60)
    first, again, other = (quantize(x, FloatFormat(4, 3), mode, seed=seed_of(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    agreement = int((first == other).sum())
    assert 0 < agreement < x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", ["fp8_e4m3", "int8", FixedFormat(8, 6), "mxfp8"], ids=str)
def test_integer_seeds_round_up_different_numbers(fmt: Format | str, dtype: torch.dtype) -> None:
    """As many as are expected, with the spread of independent draws: no seed rounds up the elements of another."""
    count, trials = 256, 1024
    x = torch.full((trials,), 1.03, dtype=dtype)
    x[0] = 1.5  # the scale of int8
    up = np.array(
        [int((fake_quantize(x, fmt, rounding="stoc_prop", seed=seed) > x)[1:].sum()) for seed in range(count)]
    )
    down, above = fake_quantize(x, fmt, rounding="minus_inf")[1].item(), fake_quantize(x, fmt, rounding="plus_inf")[1]
    p = (1.03 - down) / (above.item() - down)
    z = (up - (trials - 1) * p) / ((trials - 1) * p * (1 - p)) ** 0.5
    assert 1e-6 < stats.chi2.cdf(float((z**2).sum()), count) < 1 - 1e-6


def test_rows_are_not_alike() -> None:
    y = quantize(torch.full((64, 64), 1.03), FloatFormat(4, 3), "stoc_prop", seed=seed_of(1))
    assert len(y.unique(dim=0)) == 64


def test_the_mean_of_many_is_the_value() -> None:
    """The sum of n roundings errs by sqrt(n), not by n."""
    x = torch.rand(2**18) * 3
    error = (quantize(x, FloatFormat(4, 3), "stoc_prop", seed=seed_of(11)).double() - x.double()).sum().item()
    step = 2.0**-2
    assert abs(error) < 5 * step / 2 * len(x) ** 0.5
    assert abs((quantize(x, FloatFormat(4, 3), "towards_zero").double() - x.double()).sum().item()) > 1000


def test_small_probabilities_are_right_too() -> None:
    """2^-20 of the distance, which bits of a short random number could not tell from 0; 2^26 trials, 64 expected."""
    low, high = 1.0, 1.125
    x = torch.full((2**22,), low + (high - low) * 2.0**-20)
    up = sum(int((quantize(x, FloatFormat(4, 3), "stoc_prop", seed=seed_of(s)) == high).sum()) for s in range(16))
    assert 1e-6 < stats.poisson.cdf(up, 64) < 1 - 1e-6


def test_every_format_has_its_table() -> None:
    assert all(
        table(fmt).values[0] == 0
        for fmt in formats.values()
        if isinstance(fmt, FloatFormat) and fmt.bits == 8 and fmt.signed
    )
