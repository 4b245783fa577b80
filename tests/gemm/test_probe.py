"""The timed questions themselves: what is multiplied, by which clock, and how seconds become an answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuse_pass.gemm import measured, onednn, probe
from fuse_pass.gemm.probe import QUESTIONS, Kind, Question
from fuse_pass.inductor import compat

SIZES = (256, 768, 768)
pytestmark = [
    pytest.mark.processor,
    pytest.mark.skipif(compat.onednn_linear() is None, reason="this build of PyTorch lacks oneDNN"),
]


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    measured.table.cache_clear()
    yield
    measured.table.cache_clear()


def assert_is_a_table(table: dict[str, int]) -> None:
    assert set(table) <= {question.name for question in QUESTIONS}
    assert all(flop >= probe.MIN_FLOP for flop in table.values())


def test_the_real_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    assert_is_a_table(measured.table())
    assert torch.equal(torch.get_rng_state(), before), "the probe draws from the user's generator"


def test_both_compute_the_same_product() -> None:
    for question in QUESTIONS:
        if not onednn.multiplies(question.dtype):
            continue
        for by_aten, by_onednn in zip(*probe._contenders(question), strict=True):
            torch.testing.assert_close(by_aten(), by_onednn(), rtol=2e-2, atol=0.5, check_dtype=True, msg=question.name)


def test_a_product_that_fails_in_the_probe_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that says that it multiplies bfloat16, and has no product."""
    real = compat.onednn_linear()
    assert real is not None

    def linear(a: torch.Tensor, *rest: Any) -> torch.Tensor:
        if a.dtype is torch.bfloat16:
            raise RuntimeError("could not create a primitive descriptor for the inner product forward propagation")
        return real(a, *rest)

    monkeypatch.setattr(onednn, "_failed", set())
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: True)
    monkeypatch.setattr(compat, "onednn_linear", lambda: linear)
    found = measured.table()
    assert_is_a_table(found)
    assert not {name for name in found if name.startswith("bfloat16")}
    assert not onednn.multiplies(torch.bfloat16)
    monkeypatch.setattr(onednn, "_failed", set())
    monkeypatch.setattr(probe, "contradicts", lambda question, break_even: False)
    asked: list[str] = []
    monkeypatch.setattr(probe, "ask", lambda question: asked.append(question.name) or [probe.Round(0.5, None)])
    measured.table.cache_clear()
    measured.table()
    assert not {name for name in asked if name.startswith("bfloat16")}, "asked again in the next process"


def test_the_probe_works_in_the_middle_of_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fake tensors, proxies and autocast active it still multiplies real float32 matrices."""
    seen = []
    real = probe._seconds_per_product

    def watched(aten: Sequence[Callable[[], torch.Tensor]], onednn: Any, **options: Any) -> Any:
        seen.extend((type(output), output.dtype) for output in (run() for run in (*aten, *onednn)))
        return real(aten, onednn, **options)

    monkeypatch.setattr(probe, "_seconds_per_product", watched)
    found = []

    def traced(x: torch.Tensor) -> torch.Tensor:
        measured.forget()
        found.append(measured.table())
        return x + 1

    with torch.autocast("cpu", torch.bfloat16), torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()):
        found.append(measured.table())
        measured.table.cache_clear()
        found.append(measured.table())
    torch.fx.experimental.proxy_tensor.make_fx(traced, tracing_mode="symbolic")(torch.ones(3))
    assert len(found) == 3
    for table in found:
        assert_is_a_table(table)
    assert {kind for kind, _ in seen} == {torch.Tensor}
    assert torch.float32 in {dtype for _, dtype in seen}


def test_a_tie_goes_to_aten() -> None:
    equal_calls = (1e-6, 1e-6)
    for least in (probe.MIN_GAIN, probe.MIN_GAIN_WITH_ACTIVATION):
        for gain, expected in ((least, None), (least + 0.01, 1 << 20), (0.5, None)):
            assert probe._break_even((gain * 1e-3, 1e-3), equal_calls, SIZES, least) == expected, gain


def test_a_longer_call_moves_the_break_even() -> None:
    """Twice as fast, saving 1 ms in the large product: a call that is 10 us longer is worth a hundredth of it."""
    flop = probe._break_even((2e-3, 1e-3), (2e-6, 12e-6), SIZES, probe.MIN_GAIN)
    hundredth = 2 * math.prod(SIZES) / 100
    assert flop is not None
    assert probe._MARGIN * hundredth <= flop <= 2 * probe._MARGIN * hundredth
    assert flop & (flop - 1) == 0, "a power of two"
    assert probe._break_even((2e-3, 1e-3), (5e-6, 1e-6), SIZES, probe.MIN_GAIN) == 1 << 20, (
        "a shorter call pays at once"
    )


@pytest.mark.parametrize(
    ("break_even", "gains", "expected"),
    [
        (None, [2.0, 2.0, 2.0], True),
        (None, [2.0, 2.0, 1.2], False),
        (None, [1.3], False),
        (1 << 22, [0.5, 0.8, 0.7], True),
        (1 << 22, [0.5, 1.0], False),
        (1 << 22, [1.0], False),
    ],
)
def test_a_first_impression_is_looked_at_again(
    break_even: int | None, gains: list[float], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(gains)
    monkeypatch.setattr(probe, "_seconds_per_product", lambda aten, onednn, repeats: (left.pop(0), 1.0))
    assert probe.contradicts(Question(torch.float32, Kind.PLAIN), break_even) is expected
    assert not left, "all looks that were needed, and no more"


def test_an_activation_of_half_types_is_computed_in_float32_by_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel that Inductor makes does, which the activation in oneDNN competes with."""
    seen = []
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda h: seen.append(h.dtype) or gelu(h))
    (by_aten,), _ = probe._contenders(Question(torch.bfloat16, Kind.WITH_ACTIVATION))
    assert by_aten().dtype is torch.bfloat16
    assert seen == [torch.float32]


def test_the_least_times_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that was disturbed once is not slower for it; several are averaged."""
    monkeypatch.setattr(probe, "_clock", lambda: time.perf_counter)
    pauses = iter([0.05] * 2 + [0.004] * 100)
    aten, onednn = probe._seconds_per_product(
        [lambda: time.sleep(next(pauses)), lambda: time.sleep(0.008)], [lambda: time.sleep(0.002)]
    )
    assert 0.006 <= aten < 0.02
    assert 0.002 <= onednn < aten


def test_of_one_thread_only_its_own_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    clock = probe._clock()
    start = clock()
    time.sleep(0.05)
    assert clock() - start < 0.02, "what others do meanwhile is not counted"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    clock = probe._clock()
    start = clock()
    time.sleep(0.05)
    assert clock() - start >= 0.05, "the other threads' time is waited for"
