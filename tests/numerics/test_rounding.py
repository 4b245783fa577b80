"""The rounding op, bit for bit: against an oracle, ml_dtypes, PyTorch's own casts and MATLAB's chop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuse_pass.numerics.formats import FloatFormat, formats
from fuse_pass.numerics.rounding import ROUNDINGS
from tests.oracle import DETERMINISTIC, Table, exact_round

ml_dtypes = pytest.importorskip("ml_dtypes")

NAMED = [fmt for fmt in formats.values() if isinstance(fmt, FloatFormat) and fmt.signed and fmt.bits < 32]
OTHERS = [
    FloatFormat(4, 3),
    FloatFormat(3, 4),
    FloatFormat(2, 1),
    FloatFormat(2, 2),
    FloatFormat(6, 1),
    FloatFormat(6, 9),
    FloatFormat(7, 4),
    FloatFormat(8, 3),
    FloatFormat(8, 1),
    FloatFormat(3, 2, bias=-5),
    FloatFormat(4, 4, bias=20, encoding="fn"),
    FloatFormat(9, 4),
]
FORMATS = [*NAMED, *OTHERS]
TF32 = FloatFormat(8, 10)
TABLES: dict[FloatFormat, Table] = {}


def table(fmt: FloatFormat) -> Table:
    if fmt not in TABLES:
        TABLES[fmt] = Table(fmt)
    return TABLES[fmt]


def quantize(
    x: Tensor,
    fmt: FloatFormat,
    mode: str,
    *,
    subnormal: bool = True,
    overflow: str = "ieee",
    seed: Tensor | None = None,
) -> Tensor:
    return torch.ops.fuse_pass.fake_quantize(
        x, seed, fmt.exp_bits, fmt.sig_bits, fmt.bias, fmt.encoding, mode, subnormal, overflow, False
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal down to the sign of zero; any NaN equals any other."""
    assert a.dtype is b.dtype
    nan = a.isnan() & b.isnan()
    return torch.equal(a.masked_fill(nan, 0), b.masked_fill(nan, 0)) and torch.equal(
        a.masked_fill(nan, 0).signbit(), b.masked_fill(nan, 0).signbit()
    )


def assert_rounds_as(expected: np.ndarray, x: Tensor, ours: Tensor) -> None:
    wanted = torch.from_numpy(expected).to(x.dtype)
    if same_bits(ours, wanted):
        return
    differs = ((ours != wanted) | (ours.signbit() != wanted.signbit())) & ~(ours.isnan() & wanted.isnan())
    rows = [(x[i].item(), ours[i].item(), wanted[i].item()) for i in differs.nonzero().flatten()[:5]]
    raise AssertionError(f"{int(differs.sum())} of {x.numel()} differ; (x, ours, expected): {rows}")


def critical(fmt: FloatFormat, dtype: type[np.floating]) -> np.ndarray:
    """Every number of the format, every midpoint, both neighbours of each in `dtype`, and the ends of all ranges."""
    values = table(fmt).values
    values = values[values <= np.finfo(dtype).max]
    centres = np.concatenate([values, values[:-1] / 2 + values[1:] / 2, values[:-1] * 0.75 + values[1:] * 0.25])
    tiny = [np.finfo(dtype).smallest_subnormal, np.finfo(dtype).tiny, table(fmt).values[1] / 4]
    ends = [*tiny, np.finfo(dtype).max, np.inf, np.nan]
    with np.errstate(over="ignore"):
        centres = np.concatenate([centres, ends]).astype(dtype)
        around = np.concatenate([centres, np.nextafter(centres, dtype(0)), np.nextafter(centres, dtype(np.inf))])
    return np.unique(np.concatenate([around, -around, np.array([0.0, -0.0], dtype)]).view(f"i{dtype().nbytes}")).view(
        dtype
    )


def all_halves(dtype: torch.dtype) -> Tensor:
    """All 2^16 patterns as float32."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()


# --- against the oracle -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("subnormal", [True, False])
def test_every_number_and_midpoint_of_tf32(subnormal: bool) -> None:
    assert_agrees_with_the_table(TF32, critical(TF32, np.float32), subnormal)


@pytest.mark.parametrize("subnormal", [True, False])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_number_and_midpoint_of_a_format(fmt: FloatFormat, subnormal: bool) -> None:
    x = critical(fmt, np.float32)
    if fmt == TF32:  # 4 million, all of them in the slow test: here one in 23
        x = x[np.sort(np.random.default_rng(1).permutation(len(x))[: len(x) // 23])]
    assert_agrees_with_the_table(fmt, x, subnormal)


def assert_agrees_with_the_table(fmt: FloatFormat, x: np.ndarray, subnormal: bool) -> None:
    fits = fmt.emax <= 127
    for mode in DETERMINISTIC:
        for overflow in ("ieee", "saturate") if fits else ("ieee",):
            expected = table(fmt).round(x.astype(np.float64), mode, subnormal, overflow)
            ours = quantize(torch.from_numpy(x), fmt, mode, subnormal=subnormal, overflow=overflow)
            if not fits:  # float32 ends before the format does: that test is about everything else
                expected = np.where(np.abs(expected) > np.finfo(np.float32).max, ours.numpy(), expected)
            assert_rounds_as(expected, torch.from_numpy(x), ours)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.bits < 17], ids=lambda fmt: fmt.name)
def test_every_number_and_midpoint_in_float64(fmt: FloatFormat) -> None:
    x = critical(fmt, np.float64)
    for mode in DETERMINISTIC:
        for subnormal in (True, False):
            expected = table(fmt).round(x, mode, subnormal)
            assert_rounds_as(
                expected, torch.from_numpy(x), quantize(torch.from_numpy(x), fmt, mode, subnormal=subnormal)
            )


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_all_half_patterns(fmt: FloatFormat, half: torch.dtype) -> None:
    x = all_halves(half)
    for mode in DETERMINISTIC:
        for subnormal in (True, False):
            expected = table(fmt).round(x.double().numpy(), mode, subnormal)
            assert_rounds_as(expected, x, quantize(x, fmt, mode, subnormal=subnormal))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_tensors_round_as_their_float32(half: torch.dtype) -> None:
    """Only what the half type cannot hold differs: that has overflowed."""
    x = all_halves(half)
    for fmt in FORMATS:
        for mode in DETERMINISTIC:
            wide = quantize(x, fmt, mode)
            ours = quantize(x.to(half), fmt, mode)
            assert ours.dtype is half
            held = wide.to(half).float() == wide
            assert same_bits(ours.float()[held], wide[held]), (fmt, mode)


@given(
    x=st.floats(allow_nan=False, allow_infinity=False),
    exp_bits=st.integers(2, 11),
    sig_bits=st.integers(1, 52),
    mode=st.sampled_from(DETERMINISTIC),
    subnormal=st.booleans(),
    scale=st.integers(-60, 60),
)
@settings(max_examples=400, deadline=None)
def test_any_format_in_float64(x: float, exp_bits: int, sig_bits: int, mode: str, subnormal: bool, scale: int) -> None:
    fmt = FloatFormat(exp_bits, sig_bits)
    near = np.ldexp(np.frexp(x)[0], scale)
    for value in {x, float(near)}:
        ours = quantize(torch.tensor(value, dtype=torch.float64), fmt, mode, subnormal=subnormal).item()
        expected = exact_round(value, fmt, mode, subnormal)
        assert (ours, np.signbit(ours)) == (expected, np.signbit(expected)), value


@given(
    x=st.floats(allow_nan=False, allow_infinity=False, width=32),
    exp_bits=st.integers(2, 11),
    sig_bits=st.integers(1, 52),
    mode=st.sampled_from(DETERMINISTIC),
    subnormal=st.booleans(),
    scale=st.integers(-60, 60),
)
@settings(max_examples=400, deadline=None)
def test_any_format_in_float32(x: float, exp_bits: int, sig_bits: int, mode: str, subnormal: bool, scale: int) -> None:
    fmt = FloatFormat(exp_bits, sig_bits)
    near = np.ldexp(np.frexp(x)[0], scale)
    for value in {x, float(near)}:
        expected = exact_round(value, fmt, mode, subnormal)
        if np.float64(np.float32(expected)) != expected:
            continue  # the format is finer than float32 somewhere, or reaches further: see the next test
        ours = quantize(torch.tensor(value), fmt, mode, subnormal=subnormal).item()
        assert (ours, np.signbit(ours)) == (expected, np.signbit(expected)), value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_format_that_holds_the_dtype_leaves_it_alone(dtype: torch.dtype) -> None:
    fmt = {torch.float16: (5, 10), torch.bfloat16: (8, 7), torch.float32: (8, 23), torch.float64: (11, 52)}[dtype]
    patterns = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.randint(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1) - 1, (20000,)).to(patterns)
    for wider in (FloatFormat(*fmt), FloatFormat(min(fmt[0] + 2, 11), min(fmt[1] + 9, 52)), formats["fp64"]):
        for mode in DETERMINISTIC:
            assert same_bits(quantize(bits.view(dtype), wider, mode), bits.view(dtype)), (wider, mode)


def test_the_table_and_the_rational_oracle_agree() -> None:
    for fmt in (FloatFormat(4, 3), FloatFormat(3, 4, encoding="fn"), FloatFormat(2, 1, encoding="finite")):
        x = critical(fmt, np.float32).astype(np.float64)
        x = x[np.isfinite(x)][:: max(1, len(x) // 200)]
        for mode in DETERMINISTIC:
            for subnormal in (True, False):
                expected = [exact_round(float(value), fmt, mode, subnormal) for value in x]
                np.testing.assert_array_equal(Table(fmt).round(x, mode, subnormal), expected)


# --- against other implementations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        ("float8_e4m3fn", formats["fp8_e4m3"]),
        ("float8_e5m2", formats["fp8_e5m2"]),
        ("float8_e4m3fnuz", formats["fp8_e4m3fnuz"]),
        ("float8_e5m2fnuz", formats["fp8_e5m2fnuz"]),
        ("float8_e4m3", FloatFormat(4, 3)),
        ("float8_e3m4", FloatFormat(3, 4)),
        ("float8_e4m3b11fnuz", FloatFormat(4, 3, bias=11, encoding="fnuz")),
        ("float6_e2m3fn", formats["fp6_e2m3"]),
        ("float6_e3m2fn", formats["fp6_e3m2"]),
        ("float4_e2m1fn", formats["fp4_e2m1"]),
        ("float8_e8m0fnu", formats["e8m0"]),
        ("bfloat16", formats["bf16"]),
    ],
)
def test_agrees_with_ml_dtypes(name: str, fmt: FloatFormat) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    overflow = "ieee" if fmt.has_nan else "saturate"
    random = torch.randint(-(2**31), 2**31 - 1, (100_000,)).to(torch.int32).view(torch.float32)
    near = torch.randn(100_000) * torch.exp2(torch.randint(-20, 20, (100_000,)).float())
    x = torch.cat([all_halves(torch.float16), all_halves(torch.bfloat16), random, near])
    x = x if fmt.has_nan else x[~x.isnan()]
    if not fmt.signed:  # ml_dtypes 0.6 rounds up what lies just above 2^-127, a subnormal number of float32
        x = x[(x.abs() >= 2.0**-126) | (x == 0)]
    with np.errstate(invalid="ignore", over="ignore"):
        expected = x.numpy().astype(dtype).astype(np.float64)
    assert_rounds_as(expected, x, quantize(x, fmt, "nearest", overflow=overflow))


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_agrees_with_the_casts_of_pytorch(dtype: torch.dtype, name: str) -> None:
    random = torch.randint(-(2**31), 2**31 - 1, (400_000,)).to(torch.int32).view(torch.float32)
    x = torch.cat([random, torch.randn(100_000), torch.rand(100_000) * 2**-14, torch.tensor([65520.0, 65519.99])])
    fmt = formats[name]
    assert isinstance(fmt, FloatFormat)
    assert same_bits(quantize(x, fmt, "nearest"), x.to(dtype).float())


def test_agrees_with_matlabs_chop() -> None:
    """`tests/data/chop.npz`: x, and the answers for x (without subnormals) or x / 1000 (with them).

    With subnormals and to nearest, chop rounds twice what lies below the smallest subnormal number: first to the
    format's significand, then to that number or 0. IEEE 754, ml_dtypes and we round once; the rest agrees exactly.
    """
    answers = np.load(Path(__file__).parents[1] / "data" / "chop.npz")
    rows = {"half": (5, 10), "bfloat16": (8, 7), "q43": (4, 3), "q52": (5, 2)}
    twice_rounded = {}
    for key in answers.files:
        if key == "x":
            continue
        name, _, mode, _, subnormal = key.rsplit("_", 4)
        fmt, has_subnormals = FloatFormat(*rows[name]), subnormal == "1"
        x = torch.from_numpy(answers["x"] / 1000 if has_subnormals else answers["x"])
        ours = quantize(x, fmt, ROUNDINGS[int(mode)], subnormal=has_subnormals)
        if has_subnormals and mode == "1":
            once = quantize(x, FloatFormat(11, fmt.sig_bits), "nearest")
            twice = quantize(torch.where(x.abs() < fmt.smallest_subnormal, once, x), fmt, "nearest")
            twice_rounded[name] = int((ours != twice).sum())
            ours = twice
        assert torch.equal(ours, torch.from_numpy(answers[key])), key
    assert twice_rounded == {"half": 0, "bfloat16": 0, "q43": 286, "q52": 4}


def test_scales_are_powers_of_two() -> None:
    fmt = formats["e8m0"]
    assert isinstance(fmt, FloatFormat)
    x = torch.tensor([1.0, 1.4, 1.5, 1.9, 3.0, 2.0**-127, 1.01 * 2.0**-127, 1.5 * 2.0**-127, 1e-45, 3e38])
    powers = {
        "nearest": [1, 1, 2, 2, 4, 2.0**-127, 2.0**-127, 2.0**-126, 2.0**-127, 2.0**127],
        "towards_zero": [1, 1, 1, 1, 2, 2.0**-127, 2.0**-127, 2.0**-127, 2.0**-127, 2.0**127],
        "plus_inf": [1, 2, 2, 2, 4, 2.0**-127, 2.0**-126, 2.0**-126, 2.0**-127, 2.0**127],
    }
    for mode, expected in powers.items():
        assert quantize(x, fmt, mode, overflow="saturate").tolist() == expected
        assert quantize(x.double(), fmt, mode, overflow="saturate").tolist() == expected
    outside = torch.tensor([0.0, -0.0, -1.0, float("nan"), float("-inf")])
    assert quantize(outside, fmt, "nearest", overflow="saturate").isnan().all()


# --- laws -------------------------------------------------------------------------------------------------------------

SMALL = st.builds(FloatFormat, st.integers(2, 8), st.integers(1, 23))
NUMBERS = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30)


@given(fmt=SMALL, numbers=NUMBERS, mode=st.sampled_from(DETERMINISTIC), subnormal=st.booleans())
@settings(max_examples=300, deadline=None)
def test_laws(fmt: FloatFormat, numbers: list[float], mode: str, subnormal: bool) -> None:
    x = torch.tensor(numbers).sort().values
    y = quantize(x, fmt, mode, subnormal=subnormal)
    assert same_bits(quantize(y, fmt, mode, subnormal=subnormal), y), "idempotent"
    assert (y[1:] >= y[:-1]).all(), "monotone"
    mirrored = {"plus_inf": "minus_inf", "minus_inf": "plus_inf"}.get(mode, mode)
    assert same_bits(quantize(-x, fmt, mirrored, subnormal=subnormal), -y), "odd symmetry"
    down, up = (quantize(x, fmt, way, subnormal=subnormal) for way in ("minus_inf", "plus_inf"))
    assert (down <= x).all()
    assert (x <= up).all()
    assert ((y == down) | (y == up)).all(), "one of the two neighbours"
    exact = (down == x) & (up == x)
    assert torch.equal(y[exact], x[exact]), "exact values are fixed"


@pytest.mark.parametrize("fmt", NAMED, ids=lambda fmt: fmt.name)
def test_numbers_of_a_format_stay(fmt: FloatFormat) -> None:
    values = torch.from_numpy(table(fmt).magnitudes).float()
    for mode in DETERMINISTIC:
        assert torch.equal(quantize(values, fmt, mode), values)


@pytest.mark.parametrize("value", [1e30, 65520.0, 65536.0, 131071.0, 3.4e38])
def test_values_far_above_the_largest_do_not_wrap_around(value: float) -> None:
    fmt = FloatFormat(5, 10)
    x = torch.tensor([value, -value])
    assert quantize(x, fmt, "nearest").tolist() == [float("inf"), float("-inf")]
    assert quantize(x, fmt, "towards_zero").tolist() == [65504.0, -65504.0]
    assert quantize(x, fmt, "plus_inf").tolist() == [float("inf"), -65504.0]
    assert quantize(x, fmt, "minus_inf").tolist() == [65504.0, float("-inf")]
    assert quantize(x, fmt, "nearest", overflow="saturate").tolist() == [65504.0, -65504.0]


def test_flushed_subnormals_of_the_processor_change_nothing() -> None:
    x = torch.tensor([1e-40, -1e-45, 1e-38, 0.0])
    expected = {mode: quantize(x, FloatFormat(8, 7), mode) for mode in DETERMINISTIC}
    directed = quantize(x, FloatFormat(4, 3), "plus_inf")
    assert torch.set_flush_denormal(True)
    try:
        results = {mode: quantize(x, FloatFormat(8, 7), mode) for mode in DETERMINISTIC}
        directed_then = quantize(x, FloatFormat(4, 3), "plus_inf")
    finally:
        torch.set_flush_denormal(False)
    for mode, result in results.items():
        assert torch.equal(result.view(torch.int32), expected[mode].view(torch.int32)), mode
    assert torch.equal(directed_then, directed)
