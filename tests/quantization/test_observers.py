"""Observers against NumPy, and against each other where an outlier is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fuse_pass.numerics.formats import FloatFormat, Granularity, IntFormat
from fuse_pass.quantization.functional import fake_quantize
from fuse_pass.quantization.observers import (
    OBSERVERS,
    MeanMagnitude,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    as_observer,
)

BATCHES = [np.random.default_rng(seed).normal(seed - 1, seed + 1, (5, 4, 6)).astype(np.float32) for seed in range(3)]
GRANULARITIES = {  # and the axes that share a scale, of the batches as they lie
    "tensor": (Granularity(), (0, 1, 2), ()),
    "channel 1": (Granularity("channel", axis=1), (0, 2), (1, 4, 1)),
    "channel -1": (Granularity("channel", axis=-1), (0, 1), (1, 1, 6)),
    "token": (Granularity("token"), (2,), (5, 4, 1)),
}


def expected_scale(low: Any, high: Any, fmt: IntFormat | FloatFormat) -> tuple[Any, Any]:
    if isinstance(fmt, FloatFormat):
        return np.maximum(abs(low), abs(high)) / fmt.max, None
    if fmt.symmetric:
        return np.maximum(abs(low), abs(high)) / fmt.quant_max, None
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / (2**fmt.bits - 1)
    return scale, np.clip(fmt.quant_min - np.round(low / scale), fmt.quant_min, fmt.quant_max)


def seen(observer: Observer, batches: list[Any] = BATCHES) -> Observer:
    for batch in batches:
        observer.observe(torch.as_tensor(batch))
    return observer


def assert_same(found: tuple[Tensor, Tensor | None], scale: Any, zero_point: Any, shape: tuple[int, ...]) -> None:
    assert tuple(found[0].shape) == shape
    np.testing.assert_allclose(found[0].numpy(), scale.reshape(shape), rtol=1e-5)
    assert (found[1] is None) is (zero_point is None)
    if found[1] is not None:
        assert found[1].dtype is torch.int32
        np.testing.assert_array_equal(found[1].numpy(), zero_point.reshape(shape))


@pytest.mark.parametrize("fmt", [IntFormat(8), IntFormat(4, False), FloatFormat(4, 3)], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("case", GRANULARITIES)
def test_min_max_and_moving_average(fmt: IntFormat | FloatFormat, case: str) -> None:
    granularity, axes, shape = GRANULARITIES[case]
    lows, highs = ([end(batch, axis=axes, keepdims=True) for batch in BATCHES] for end in (np.min, np.max))
    whole = expected_scale(np.minimum.reduce(lows), np.maximum.reduce(highs), fmt)
    assert_same(seen(MinMax(granularity)).scale_and_zero_point(fmt), *whole, shape)

    low, high = lows[0], highs[0]
    for new_low, new_high in zip(lows[1:], highs[1:], strict=True):
        low, high = low + 0.25 * (new_low - low), high + 0.25 * (new_high - high)
    averaged = MovingAverage(granularity, momentum=0.25)
    assert_same(seen(averaged).scale_and_zero_point(fmt), *expected_scale(low, high, fmt), shape)


@pytest.mark.parametrize("fmt", [IntFormat(8), IntFormat(8, False)], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("percent", [90.0, 99.0, 100.0])
def test_percentile(fmt: IntFormat, percent: float) -> None:
    everything = np.concatenate(BATCHES)
    for case in ("tensor", "channel 1"):
        granularity, axes, shape = GRANULARITIES[case]
        low, high = (np.percentile(everything, p, axis=axes, keepdims=True) for p in (100 - percent, percent))
        found = seen(Percentile(granularity, percent)).scale_and_zero_point(fmt)
        assert_same(found, *expected_scale(low, high, fmt), shape)


def test_mean_magnitude() -> None:
    scale, zero_point = seen(MeanMagnitude()).scale_and_zero_point("int4")
    np.testing.assert_allclose(scale, 2 * np.abs(np.stack(BATCHES)).mean() / np.sqrt(7), rtol=1e-6)
    assert zero_point is None
    # Without a mean that is 0, asymmetric integers and floating point need the range.
    for fmt in ("int4_asymmetric", "fp8_e4m3"):
        assert_same(
            seen(MeanMagnitude()).scale_and_zero_point(fmt),
            *(None if q is None else q.numpy() for q in seen(MinMax()).scale_and_zero_point(fmt)),
            (),
        )


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(Granularity(), ()), (Granularity("channel", axis=0), (7, 1)), (Granularity("group", size=4), (7, 3, 1))],
    ids=["tensor", "channel", "group"],
)
@pytest.mark.parametrize("fmt", ["int8", "int4_asymmetric", "fp8_e4m3"])
def test_scales_go_straight_into_fake_quantize(
    name: str, granularity: Granularity, shape: tuple[int, ...], fmt: str
) -> None:
    x = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    scale, zero_point = seen(OBSERVERS[name](granularity), [x]).scale_and_zero_point(fmt)
    assert tuple(scale.shape) == shape
    y = fake_quantize(x, fmt, granularity=granularity, scale=scale, zero_point=zero_point)
    assert y.shape == x.shape
    assert (y - x).square().mean() < 0.05 * x.square().mean()


@pytest.mark.parametrize("granularity", [Granularity(), Granularity("channel", axis=1)], ids=["tensor", "channel"])
@pytest.mark.parametrize("fmt", ["int8", "int5_asymmetric"])
def test_min_max_of_one_batch_is_the_dynamic_scale_bit_for_bit(granularity: Granularity, fmt: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(6, 5, dtype=torch.float64).to(dtype)
        scale, zero_point = seen(MinMax(granularity), [x]).scale_and_zero_point(fmt)
        static = fake_quantize(x, fmt, granularity=granularity, scale=scale, zero_point=zero_point)
        assert torch.equal(static, fake_quantize(x, fmt, granularity=granularity))


def errors_with_an_outlier(name: str, fmt: str, outlier: float) -> Tensor:
    x = torch.randn(60_000, generator=torch.Generator().manual_seed(0))
    x[17] = outlier
    scale, zero_point = seen(OBSERVERS[name](), [x]).scale_and_zero_point(fmt)
    return (fake_quantize(x, fmt, scale=scale, zero_point=zero_point) - x).square()


@pytest.mark.parametrize("fmt", ["int8", "int4", "int8_asymmetric"])
def test_percentile_leaves_an_outlier_out(fmt: str) -> None:
    """Min-max spends all integers on a single value of 1000 among 60 000 of magnitude 1."""
    others = [float(errors_with_an_outlier(name, fmt, 1000.0).sort().values[:-1].mean()) for name in OBSERVERS]
    by_name = dict(zip(OBSERVERS, others, strict=True))
    assert by_name["percentile"] < by_name["minmax"] / 10


@pytest.mark.parametrize(("fmt", "ratio"), [("int8", 1.2), ("int4", 3), ("int3_asymmetric", 3)])
def test_mse_weighs_an_outlier(fmt: str, ratio: float) -> None:
    """A value of 100 weighs as much as 10 000 of magnitude 1, so that the gain is smaller, but in the error of all."""
    errors = {name: float(errors_with_an_outlier(name, fmt, 100.0).mean()) for name in OBSERVERS}
    assert errors["mse"] < errors["minmax"] / ratio
    assert errors["mse"] == min(errors.values())


@pytest.mark.parametrize("fmt", [IntFormat(3), IntFormat(4), IntFormat(6, False)], ids=lambda fmt: fmt.name)
def test_mse_is_the_least_error_of_all_thresholds(fmt: IntFormat) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    scale, zero_point = seen(OBSERVERS["mse"](), [x]).scale_and_zero_point(fmt)

    def error(scale: float, zero: float) -> float:
        q = np.clip(np.round(x.numpy() / scale) + zero, fmt.quant_min, fmt.quant_max)
        return float((((q - zero) * scale - x.numpy()) ** 2).mean())

    low, high = float(x.min()), float(x.max())
    candidates = [
        expected_scale(np.float64(max(low, -t)), np.float64(min(high, t)), fmt) for t in np.linspace(0.05, 4.5, 400)
    ]
    least = min(error(float(s), 0.0 if z is None else float(z)) for s, z in candidates)
    assert error(float(scale), 0.0 if zero_point is None else float(zero_point)) <= least * 1.01


def test_many_values_are_thinned_evenly_and_repeatably() -> None:
    observers = [Percentile(percent=99.0), Percentile(percent=99.0)]
    before = torch.random.get_rng_state()
    for observer in observers:
        for batch in range(8):
            observer.observe(torch.linspace(0, 1, 100_003) + batch)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert observers[0]._kept.numel() <= Percentile.LIMIT
    scales = [observer.scale_and_zero_point("int8")[0] for observer in observers]
    assert torch.equal(*scales)
    torch.testing.assert_close(scales[0] * 127, torch.tensor(7.92), rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", OBSERVERS)
def test_zeros_constants_empty_and_scalar_tensors(name: str) -> None:
    for value in (0.0, -2.5):
        for shape in ((), (3,), (2, 0, 3)):
            observer = OBSERVERS[name]()
            observer.observe(torch.full(shape, value))
            if 0 in shape:
                with pytest.raises(ValueError, match="nothing was observed"):
                    observer.scale_and_zero_point("int8")
                continue
            for fmt in ("int8", "int8_asymmetric"):
                scale, _ = observer.scale_and_zero_point(fmt)
                assert scale.shape == ()
                assert scale > 0


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="unknown observer 'max'; valid names are minmax, moving_average, percentile"):
        as_observer("max")
    with pytest.raises(TypeError, match="expected the name of an observer"):
        as_observer(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="percent must lie above 50"):
        Percentile(percent=0.9999)
    with pytest.raises(ValueError, match="momentum"):
        MovingAverage(momentum=0)
    with pytest.raises(ValueError, match="unknown granularity 'row'"):
        MinMax("row")
    with pytest.raises(ValueError, match="NaN or infinity"):
        MinMax().observe(torch.tensor([1.0, torch.inf]))
    with pytest.raises(ValueError, match="mxfp8 brings its own scale"):
        seen(MinMax()).scale_and_zero_point("mxfp8")
    observer = MinMax("token")
    observer.observe(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"shape \(4, 1\) after \(2, 1\).*must not depend on the batch"):
        observer.observe(torch.ones(4, 3))
