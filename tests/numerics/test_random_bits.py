"""The random numbers: the bits themselves, their statistics, dropout on top of them, and the seed op."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fuse_pass.numerics import random_bits

GENERATOR_SEEDS = (0, 1, 2**31 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1)
RATES = (1e-3, 0.1, 0.5, 0.9)
MAX_Z = 5.0


def seed_of(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def drawn_seeds(count: int) -> list[int]:
    """Seeds as the op draws them: 63 random bits."""
    return [int(value) for value in np.random.default_rng(7).integers(0, 2**63, count)]


def mask(seed: int, rows: int, columns: int, p: float = 0.5) -> np.ndarray:
    return random_bits.keep_mask(seed_of(seed), rows, columns, p).numpy()


def numpy_bits(seed: int, rows: int, columns: int) -> np.ndarray:
    """The hash of the module, written once more in unsigned arithmetic."""
    low, high = np.array([seed & 0xFFFFFFFF], np.uint32), np.uint32(seed >> 32)
    mixed = (low ^ (low >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    high = high ^ (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0xD35A2D97)
    index = (np.arange(rows * columns, dtype=np.uint64) & 0xFFFFFFFF).astype(np.uint32).reshape(rows, columns)
    bits = (index ^ low) * np.uint32(0x21F0AAAD) ^ high
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0xD35A2D97)
    bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x31848BAB)
    return bits.view(np.int32)


def binomial_z(successes: int, trials: int, probability: float) -> float:
    deviation = math.sqrt(trials * probability * (1 - probability))
    return abs(successes - trials * probability) / deviation


def agreement_z(a: np.ndarray, b: np.ndarray) -> float:
    """How far two masks of rate 1/2 are from agreeing at half of their places."""
    return binomial_z(int((a == b).sum()), a.size, 0.5)


# --- the bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", GENERATOR_SEEDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 128), (1, 1000), (1000, 1)])
def test_bits_equal_those_of_unsigned_arithmetic(seed: int, shape: tuple[int, int]) -> None:
    assert np.array_equal(random_bits.random_bits(seed_of(seed), *shape).numpy(), numpy_bits(seed, *shape))


def test_bits_depend_on_the_element_index_alone() -> None:
    by_row, by_column = random_bits.random_bits(seed_of(5), 6, 20), random_bits.random_bits(seed_of(5), 20, 6)
    assert torch.equal(by_row.flatten(), by_column.flatten())


def test_every_index_has_its_own_bits() -> None:
    """The hash is a permutation of the 32-bit integers for any seed, so no two elements share a number."""
    bits = random_bits.random_bits(seed_of(GENERATOR_SEEDS[4]), 512, 512)
    assert bits.unique().numel() == 512 * 512


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_bits_equal_eager_bits(dynamic: bool) -> None:
    compiled = torch.compile(random_bits.random_bits, backend="inductor", dynamic=dynamic)
    for seed in GENERATOR_SEEDS:
        for shape in ((33, 70), (128, 64)):
            assert torch.equal(compiled(seed_of(seed), *shape), random_bits.random_bits(seed_of(seed), *shape))


@pytest.mark.parametrize("p", RATES)
def test_compiled_dropout_equals_eager_dropout(p: float) -> None:
    x = torch.randn(40, 100)
    compiled = torch.compile(random_bits.dropout, backend="inductor")
    assert torch.equal(compiled(x, seed_of(3), p), random_bits.dropout(x, seed_of(3), p))


# --- the statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("shape", [(500, 768), (512, 512), (1, 2**18), (2**18, 1), (4096, 3)])
def test_keep_frequency(p: float, shape: tuple[int, int]) -> None:
    for seed in drawn_seeds(4):
        kept = int(mask(seed, *shape, p).sum())
        assert binomial_z(kept, math.prod(shape), 1 - p) < MAX_Z, f"seed {seed}"


def test_keep_frequency_of_nearly_one() -> None:
    trials, probability = 8 * 2**20, 1e-6
    kept = sum(int(mask(seed, 1024, 1024, 1 - probability).sum()) for seed in drawn_seeds(8))
    assert stats.poisson.cdf(kept, trials * probability) > 1e-6
    assert stats.poisson.sf(kept - 1, trials * probability) > 1e-6


def test_keep_mask_at_the_ends() -> None:
    assert mask(11, 256, 256, 0.0).all()
    # One index in 2**32 would pass the largest threshold; `dropout` itself never asks for p = 1.
    assert mask(11, 256, 256, 1.0).sum() <= 1


def test_bits_are_uniform() -> None:
    """The high byte decides nearly everything: 256 cells, and every one of the 8 highest bits."""
    for seed in drawn_seeds(4):
        high = (random_bits.random_bits(seed_of(seed), 512, 512).numpy().view(np.uint32) >> 24).ravel()
        counts = np.bincount(high, minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6


def test_no_correlation_with_a_later_element() -> None:
    rows, columns = 512, 768
    lags = {1, 2, 3, columns - 1, columns, columns + 1, 2 * columns, *(2**k for k in range(18))}
    for seed in drawn_seeds(3):
        flat = mask(seed, rows, columns).ravel()
        for lag in lags:
            assert agreement_z(flat[:-lag], flat[lag:]) < MAX_Z, f"seed {seed}, lag {lag}"


@pytest.mark.parametrize("lag", [1, 2, 768, 1024])
def test_joint_frequencies_of_pairs(lag: int) -> None:
    """Chi-square of the 16 x 16 cells of (high nibble here, high nibble `lag` later)."""
    nibbles = (random_bits.random_bits(seed_of(drawn_seeds(1)[0]), 1024, 768).numpy().view(np.uint32) >> 28).ravel()
    cells = np.bincount(nibbles[:-lag] * 16 + nibbles[lag:], minlength=256)
    assert stats.chisquare(cells).pvalue > 1e-6


def test_joint_frequencies_of_four_neighbours() -> None:
    quarters = random_bits.random_bits(seed_of(drawn_seeds(1)[0]), 1024, 768).numpy().view(np.uint32) >> 30
    a, b, c, d = quarters.reshape(-1, 4).T
    cells = np.bincount(((a * 4 + b) * 4 + c) * 4 + d, minlength=256)
    assert stats.chisquare(cells).pvalue > 1e-6


@pytest.mark.parametrize("columns", [512, 768, 1024])
def test_rows_and_columns_vary_like_binomials(columns: int) -> None:
    """Sums over whole rows and columns: too even a spread is as wrong as too wide a one."""
    rows = 1024
    for seed in drawn_seeds(3):
        kept = mask(seed, rows, columns)
        for axis, lines, length in ((1, rows, columns), (0, columns, rows)):
            chi_square = float((((kept.sum(axis) - length / 2) ** 2) / (length / 4)).sum())
            assert 1e-6 < stats.chi2.cdf(chi_square, lines) < 1 - 1e-6, f"seed {seed}, axis {axis}"


def test_no_two_rows_and_no_two_columns_are_alike() -> None:
    """The largest correlation of 256 rows (32640 pairs) over 4096 columns, and the same of columns."""
    for matrix in (mask(drawn_seeds(1)[0], 256, 4096), mask(drawn_seeds(2)[1], 4096, 256).T):
        signs = matrix * 2.0 - 1
        correlation = signs @ signs.T / 4096**0.5
        np.fill_diagonal(correlation, 0)
        assert np.abs(correlation).max() < 5.5  # expected largest of 32640 normals: 4.2


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_consecutive_seeds_are_independent(p: float) -> None:
    """At p = 0.1 the expected joint frequency of two kept elements is 0.81."""
    for start in (0, 41, drawn_seeds(1)[0]):
        masks = [mask(start + i, 256, 768, p) for i in range(5)]
        for i in range(4):
            both = int((masks[i] & masks[i + 1]).sum())
            assert binomial_z(both, masks[i].size, (1 - p) ** 2) < MAX_Z


@pytest.mark.parametrize("bit", range(63))
def test_seeds_that_differ_in_one_bit_are_independent(bit: int) -> None:
    for seed in drawn_seeds(2):
        assert agreement_z(mask(seed, 256, 768), mask(seed ^ (1 << bit), 256, 768)) < MAX_Z


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(
    "start", [0, 2**31 - 150, 2**40, drawn_seeds(1)[0]], ids=["first", "low half", "high half", "drawn"]
)
def test_sums_over_consecutive_seeds_vary_like_binomials(start: int, p: float) -> None:
    """No seed keeps the elements of another in other places."""
    rows, columns, count = 32, 64, 300
    kept = np.array([mask(start + i, rows, columns, p).sum() for i in range(count)])
    z = (kept - rows * columns * (1 - p)) / math.sqrt(rows * columns * p * (1 - p))
    assert 1e-6 < stats.chi2.cdf(float((z**2).sum()), count) < 1 - 1e-6
    assert abs(float((z[1:] * z[:-1]).sum())) < MAX_Z * math.sqrt(count)


@pytest.mark.parametrize("bit", range(63))
def test_sums_of_seeds_that_differ_in_one_bit_are_independent(bit: int) -> None:
    kept = np.array(
        [[mask(s, 32, 32).sum() for s in (seed, seed ^ (1 << bit))] for seed in (*range(64), *drawn_seeds(64))]
    )
    z = (kept - 512) / 16
    assert abs(float((z[:, 0] * z[:, 1]).sum())) < MAX_Z * math.sqrt(len(z))


@pytest.mark.parametrize("bit", range(17))
def test_no_seed_moves_the_elements_of_another(bit: int) -> None:
    for seed in (0, 41, drawn_seeds(1)[0]):
        a, b = (mask(s, 256, 512).ravel() for s in (seed, seed ^ (1 << bit)))
        lag = 1 << bit
        assert agreement_z(a, b[np.arange(b.size) ^ lag]) < MAX_Z
        assert agreement_z(a[:-lag], b[lag:]) < MAX_Z
        assert agreement_z(a[lag:], b[:-lag]) < MAX_Z


def test_drawn_seeds_give_unrelated_masks_at_any_shift() -> None:
    """One layer's mask is no shifted copy of another's: all cyclic shifts at once, by a Fourier transform."""
    size = 2**17
    signs = [mask(seed, 128, 1024).ravel() * 2.0 - 1 for seed in drawn_seeds(6)]
    spectra = [np.fft.rfft(sign) for sign in signs]
    for i, a in enumerate(spectra):
        for b in spectra[i + 1 :]:
            correlation = np.fft.irfft(a * np.conj(b), size) / size**0.5
            assert np.abs(correlation).max() < 6.0  # expected largest of 131072 normals: 4.5


def test_two_draws_of_one_run_are_independent() -> None:
    layers = [int(torch.ops.fuse_pass.seed(device=torch.device("cpu"))) for _ in range(6)]
    for a, b in itertools.pairwise(layers):
        assert agreement_z(mask(a, 256, 768), mask(b, 256, 768)) < MAX_Z


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_one_bit_of_the_seed_over_large_masks(p: float) -> None:
    """Every bit, 4 million elements."""
    trials, joint = 4 * 2**20, (1 - p) ** 2
    for seed in drawn_seeds(2):
        base = mask(seed, 2048, 2048, p)
        for bit in range(63):
            both = int((base & mask(seed ^ (1 << bit), 2048, 2048, p)).sum())
            assert binomial_z(both, trials, joint) < MAX_Z, f"seed {seed}, bit {bit}"


@pytest.mark.slow
def test_statistics_over_many_seeds() -> None:
    """2000 seeds: the z of the frequency, of lag 1 and of one row down are themselves standard normal."""
    rows, columns = 128, 512
    z: dict[str, list[float]] = {"frequency": [], "lag 1": [], "lag row": [], "next seed": []}
    for seed in drawn_seeds(2000):
        signs = mask(seed, rows, columns) * 2.0 - 1
        flat, following = signs.ravel(), (mask(seed + 1, rows, columns) * 2.0 - 1).ravel()
        for name, product in (
            ("frequency", flat),
            ("lag 1", flat[1:] * flat[:-1]),
            ("lag row", flat[columns:] * flat[:-columns]),
            ("next seed", flat * following),
        ):
            z[name].append(float(product.sum() / product.size**0.5))
    for name, values in z.items():
        assert stats.kstest(values, "norm").pvalue > 1e-6, name
        assert np.abs(values).max() < MAX_Z, name


@pytest.mark.slow
@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9, 1 - 1e-6])
def test_keep_frequency_of_a_hundred_million(p: float) -> None:
    trials = 100 * 2**20
    kept = sum(int(mask(seed, 1024, 1024, p).sum()) for seed in drawn_seeds(100))
    assert binomial_z(kept, trials, 1 - p) < MAX_Z


@pytest.mark.slow
def test_lags_over_one_large_mask() -> None:
    flat = mask(drawn_seeds(1)[0], 8192, 4096)
    packed = flat.ravel()
    for lag in (*range(1, 40), *(2**k for k in range(6, 25)), 4095, 4097, 8191, 8193, 3 * 4096):
        assert agreement_z(packed[:-lag], packed[lag:]) < MAX_Z, f"lag {lag}"


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_keeps_and_scales() -> None:
    x = torch.randn(50, 60, dtype=torch.float64)
    keep = random_bits.keep_mask(seed_of(9), 50, 60, 0.25)
    dropped = random_bits.dropout(x, seed_of(9), 0.25)
    assert 0 < keep.sum() < keep.numel()
    assert torch.equal(dropped[keep], x[keep] * (1 / 0.75))
    assert torch.equal(dropped[~keep], torch.zeros_like(x[~keep]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_keeps_the_dtype(dtype: torch.dtype, p: float) -> None:
    assert random_bits.dropout(torch.ones(4, 5, dtype=dtype), seed_of(1), p).dtype is dtype


def test_inactive_dropout_returns_its_input() -> None:
    x = torch.randn(3, 4)
    assert random_bits.dropout(x, None, 0.5) is x
    assert random_bits.dropout(x, seed_of(0), 0.0) is x


@pytest.mark.parametrize("value", [1.0, math.inf, -math.inf, math.nan])
def test_dropping_everything_gives_exact_zeros(value: float) -> None:
    dropped = random_bits.dropout(torch.full((5, 6), value), seed_of(2), 1.0)
    assert torch.equal(dropped, torch.zeros(5, 6))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_dropped_places_are_zero_whatever_stood_there(value: float) -> None:
    keep = random_bits.keep_mask(seed_of(2), 20, 30, 0.5)
    dropped = random_bits.dropout(torch.full((20, 30), value), seed_of(2), 0.5)
    assert torch.equal(dropped[~keep], torch.zeros(int((~keep).sum())))
    assert not torch.isfinite(dropped[keep]).any()


def test_expectation_is_kept() -> None:
    kept = torch.stack([random_bits.dropout(torch.ones(128, 128), seed_of(s), 0.3) for s in drawn_seeds(20)])
    deviation = math.sqrt(0.3 / 0.7 / kept.numel())
    assert abs(kept.double().mean().item() - 1) < MAX_Z * deviation


# --- the seed ---------------------------------------------------------------------------------------------------------


def draw() -> int:
    return int(torch.ops.fuse_pass.seed(device=torch.device("cpu")))


def test_seed_follows_manual_seed() -> None:
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert (draw(), draw()) == (first, second)
    torch.manual_seed(2)
    assert draw() not in (first, second)
    assert first != second


def test_compiled_seed_follows_manual_seed() -> None:
    @torch.compile(backend="inductor")
    def two_draws() -> tuple[Tensor, Tensor]:
        cpu = torch.device("cpu")
        return torch.ops.fuse_pass.seed(device=cpu), torch.ops.fuse_pass.seed(device=cpu)

    def run(manual_seed: int) -> tuple[int, int]:
        torch.manual_seed(manual_seed)
        first, second = two_draws()
        return int(first), int(second)

    assert run(1) == run(1)
    assert len({*run(1), *run(2)}) == 4


def test_seed_is_a_63_bit_integer_on_its_device() -> None:
    value = torch.ops.fuse_pass.seed(device=torch.device("cpu"))
    assert (value.dtype, value.shape, value.device.type) == (torch.int64, (), "cpu")
    drawn = [draw() for _ in range(64)]
    assert min(drawn) >= 0
    assert max(drawn) >= 2**61  # all of 64 below would be a lost high half
    assert len({value >> 32 for value in drawn}) == len({value & 0xFFFFFFFF for value in drawn}) == 64


def test_dropout_draws_nothing_itself() -> None:
    before = torch.get_rng_state()
    random_bits.dropout(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), seed_of(1), 0.5)
    random_bits.dropout(torch.ones(3, 4), None, 0.5)
    assert torch.equal(torch.get_rng_state(), before)
    draw()
    assert not torch.equal(torch.get_rng_state(), before)


def test_seed_on_fake_tensors_draws_nothing() -> None:
    before = torch.get_rng_state()
    with torch._subclasses.FakeTensorMode():
        value = torch.ops.fuse_pass.seed(device=torch.device("cpu"))
    assert (value.dtype, value.shape) == (torch.int64, ())
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.fuse_pass.seed.default, (), {"device": torch.device("cpu")})


def test_taken_seed_is_a_copy() -> None:
    counter = seed_of(2**62 + 5)
    taken = torch.ops.fuse_pass.taken_seed(counter, device=torch.device("cpu"))
    counter.add_(1)
    assert (int(taken), int(counter)) == (2**62 + 5, 2**62 + 6)
    torch.library.opcheck(torch.ops.fuse_pass.taken_seed.default, (counter,), {"device": torch.device("cpu")})
