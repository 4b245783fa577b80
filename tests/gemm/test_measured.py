"""The probe that chooses who multiplies matrices, and the file that keeps its verdicts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuse_pass.gemm import measured, onednn
from fuse_pass.inductor import compat
from tests.gemm.test_providers import chosen

BREAK_EVEN = 4 * measured.MIN_FLOP
LARGE = (512, 256, 256)
SIZES = (256, 768, 768)
VERDICTS = {"float32": BREAK_EVEN}
pytestmark = [
    pytest.mark.processor,
    pytest.mark.skipif(compat.onednn_linear() is None, reason="this build of PyTorch lacks oneDNN"),
]


class Probe:
    """Stands in for the timed probe and counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> dict[str, int]:
        self.runs += 1
        return dict(VERDICTS)


@pytest.fixture(autouse=True)
def forgotten_table() -> Iterator[None]:
    measured.table.cache_clear()
    yield
    measured.table.cache_clear()


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    found = Probe()
    monkeypatch.setattr(measured, "_probe", found)
    return found


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    path = measured._cache_file()
    assert path.is_relative_to(tmp_path)
    return path


def next_process() -> dict[str, int]:
    measured.table.cache_clear()
    return measured.table()


def test_probed_once_and_read_again(file: Path, probe: Probe) -> None:
    assert measured.table() == VERDICTS
    written = json.loads(file.read_text())
    assert written["break_even_flop"] == VERDICTS
    assert written["machine"] == measured._machine()
    assert torch.__version__ in written["machine"]
    assert next_process() == VERDICTS
    assert measured.table() == VERDICTS
    assert probe.runs == 1
    assert list(file.parent.iterdir()) == [file], "a temporary file is left"


def write_verdicts(file: Path, verdicts: str, machine: str | None = None) -> None:
    """The file as `gemm` writes it, with this JSON as its verdicts."""
    file.parent.mkdir(parents=True)
    file.write_text(f'{{"machine": {json.dumps(machine or measured._machine())}, "break_even_flop": {verdicts}}}')


@pytest.mark.parametrize("verdicts", [{"bfloat16": 1 << 21}, {"float32+activation": measured.MIN_FLOP}, {}])
def test_the_file_is_believed(verdicts: dict[str, int], file: Path, probe: Probe) -> None:
    write_verdicts(file, json.dumps(verdicts))
    assert measured.table() == verdicts
    assert probe.runs == 0


def assert_replaced(file: Path, probe: Probe) -> None:
    assert measured.table() == VERDICTS
    assert next_process() == VERDICTS
    assert probe.runs == 1
    assert json.loads(file.read_text())["break_even_flop"] == VERDICTS


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"null", b"17", b'"x"', b"\xff\xfe\x00", b"[" * 200_000, b'{"machine":' * 200_000],
    ids=lambda content: content[:12].decode(errors="replace"),
)
def test_a_corrupt_file_is_replaced(content: bytes, file: Path, probe: Probe) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert_replaced(file, probe)


DEEP = "[" * 200_000 + "]" * 200_000
NO_VERDICTS = [*("null", "3", "[]", DEEP), '{"float32": "onednn"}', '{"float64": 4000000}', '{"": 4000000}']
NO_FLOP = [*("NaN", "Infinity", "-Infinity", "1e999", "0", "-4000000", "true", "false", "4000000.0", "999999", "null")]
NO_FLOP += ['"4000000"', "[4000000]", "9" * 10_000, DEEP]


@pytest.mark.parametrize(
    "verdicts", [*NO_VERDICTS, *(f'{{"float32": {flop}}}' for flop in NO_FLOP)], ids=lambda text: text[:24]
)
def test_verdicts_that_no_probe_can_have_found_are_replaced(verdicts: str, file: Path, probe: Probe) -> None:
    write_verdicts(file, verdicts)
    assert_replaced(file, probe)


def test_a_file_of_another_machine_is_replaced(file: Path, probe: Probe) -> None:
    """However it came by this name."""
    write_verdicts(file, '{"bfloat16": 4000000}', machine="another")
    assert_replaced(file, probe)


def test_an_unwritable_cache_costs_only_a_probe(file: Path, probe: Probe) -> None:
    file.parent.parent.mkdir(parents=True, exist_ok=True)
    file.parent.write_text("a file stands where the folder should be")
    assert measured.table() == VERDICTS
    assert next_process() == VERDICTS
    assert probe.runs == 2


def test_a_directory_in_place_of_the_file(file: Path, probe: Probe) -> None:
    (file / "in the way").mkdir(parents=True)
    assert measured.table() == VERDICTS


def test_all_that_a_verdict_depends_on_has_its_own_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {file}
    others: list[tuple[object, str, object]] = [
        (torch, "get_num_threads", lambda: 77),
        (torch, "__version__", "9.9"),
        (measured, "processor", lambda: "another CPU @ 3 GHz / x"),
        (measured, "instruction_set", lambda: "SIMD77"),
        (onednn, "multiplies", lambda dtype: False),
        (onednn, "multiplies", lambda dtype: dtype in (torch.float16, torch.int8)),
        (compat, "onednn_version", lambda: "7.7"),
        (measured, "_VERSION", 77),
    ]
    for owner, name, value in others:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            files.add(measured._cache_file())
    assert len(files) == len(others) + 1
    assert all(path.parent == file.parent for path in files)


def test_processors_of_one_name_have_a_table_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`AMD EPYC` is any of five generations. Their caches meet where a home or an image of a container is shared."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = {"rich": {"bfloat16": measured.MIN_FLOP}, "poor": {"float32": 8 * measured.MIN_FLOP}}
    probed = []
    for kind in ("rich", "poor", "rich", "poor"):
        monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype, kind=kind: kind == "rich")
        monkeypatch.setattr(measured, "_probe", lambda kind=kind: probed.append(kind) or found[kind])
        assert next_process() == found[kind]
        assert chosen(torch.bfloat16, LARGE) == ("onednn" if kind == "rich" else "aten")
    assert probed == ["rich", "poor"]


def test_without_onednn_nothing_is_probed(monkeypatch: pytest.MonkeyPatch, file: Path, probe: Probe) -> None:
    monkeypatch.setattr(compat, "onednn_linear", lambda: None)
    assert measured.table() == {}
    assert chosen(torch.float32, LARGE) == "aten"
    assert probe.runs == 0
    assert not file.exists()


def assert_is_a_table(table: dict[str, int]) -> None:
    assert set(table) <= {name + suffix for name in ("float32", "bfloat16") for suffix in ("", "+activation")}
    assert all(flop >= measured.MIN_FLOP for flop in table.values())


def test_the_real_probe(file: Path) -> None:
    before = torch.get_rng_state()
    assert_is_a_table(measured.table())
    assert next_process() == measured.table()
    assert torch.equal(torch.get_rng_state(), before), "the probe draws from the user's generator"


def test_a_product_that_fails_in_the_probe_is_no_candidate(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert_is_a_table(measured.table())
    found = measured.table()
    assert not {key for key in found if key.startswith("bfloat16")}
    assert not onednn.multiplies(torch.bfloat16)
    monkeypatch.setattr(onednn, "_failed", set())
    monkeypatch.setattr(measured, "_probe", lambda: pytest.fail("probed again in the next process"))
    assert next_process() == found


def test_the_probe_works_in_the_middle_of_a_trace(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fake tensors, proxies and autocast active it still multiplies real float32 matrices."""
    seen = []
    real = measured._seconds_per_product

    def watched(aten: list[Callable[[], torch.Tensor]], onednn: list[Callable[[], torch.Tensor]]) -> Any:
        seen.extend((type(output), output.dtype) for output in (run() for run in (*aten, *onednn)))
        return real(aten, onednn)

    monkeypatch.setattr(measured, "_seconds_per_product", watched)
    found = []

    def traced(x: torch.Tensor) -> torch.Tensor:
        measured.table.cache_clear()
        found.append(measured.table())
        return x + 1

    with torch.autocast("cpu", torch.bfloat16), torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()):
        found.append(measured.table())
    torch.fx.experimental.proxy_tensor.make_fx(traced, tracing_mode="symbolic")(torch.ones(3))
    assert len(found) == 2
    for table in found:
        assert_is_a_table(table)
    assert {kind for kind, _ in seen} == {torch.Tensor}
    assert torch.float32 in {dtype for _, dtype in seen}


def test_a_tie_goes_to_aten() -> None:
    equal_calls = (1e-6, 1e-6)
    for least in (measured.MIN_GAIN, measured.MIN_GAIN_WITH_ACTIVATION):
        for gain, expected in ((least, None), (least + 0.01, 1 << 20), (0.5, None)):
            assert measured._break_even((gain * 1e-3, 1e-3), equal_calls, SIZES, least) == expected, gain


def test_a_longer_call_moves_the_break_even() -> None:
    """Twice as fast, saving 1 ms in the large product: a call that is 10 us longer is worth a hundredth of it."""
    flop = measured._break_even((2e-3, 1e-3), (2e-6, 12e-6), SIZES, measured.MIN_GAIN)
    hundredth = 2 * math.prod(SIZES) / 100
    assert flop is not None
    assert measured._MARGIN * hundredth <= flop <= 2 * measured._MARGIN * hundredth
    assert flop & (flop - 1) == 0, "a power of two"
    assert measured._break_even((2e-3, 1e-3), (5e-6, 1e-6), SIZES, measured.MIN_GAIN) == 1 << 20, (
        "a shorter call pays at once"
    )


def test_an_activation_of_half_types_is_computed_in_float32_by_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel that Inductor makes does, which the activation in oneDNN competes with."""
    seen = []
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda h: seen.append(h.dtype) or gelu(h))
    (by_aten,), (by_onednn,) = measured._contenders((8, 16, 24), torch.bfloat16, with_activation=True)
    assert by_aten().dtype is torch.bfloat16
    assert seen == [torch.float32]
    if onednn.multiplies(torch.bfloat16):  # or the probe leaves bfloat16 out
        torch.testing.assert_close(by_aten(), by_onednn(), rtol=2e-2, atol=2e-2, check_dtype=True)


def test_the_least_times_count() -> None:
    """A product that was disturbed once is not slower for it; several are averaged."""
    pauses = iter([0.05] * 2 + [0.004] * 100)
    aten, onednn = measured._seconds_per_product(
        [lambda: time.sleep(next(pauses)), lambda: time.sleep(0.008)], [lambda: time.sleep(0.002)]
    )
    assert 0.006 <= aten < 0.02
    assert 0.002 <= onednn < aten
