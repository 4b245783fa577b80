"""The probe that chooses who multiplies matrices, and the file that keeps its verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuse_pass.inductor import compat, gemm

CPU = torch.device("cpu")
LARGE = 10 * gemm.MIN_FLOP
VERDICTS = {"float32": gemm.ONEDNN, "float32+activation": gemm.ATEN}
pytestmark = pytest.mark.skipif(compat.onednn_linear() is None, reason="this build of PyTorch lacks oneDNN")


class Probe:
    """Stands in for the timed probe and counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> dict[str, str]:
        self.runs += 1
        return dict(VERDICTS)


@pytest.fixture(autouse=True)
def forgotten_table() -> Iterator[None]:
    gemm.table.cache_clear()
    yield
    gemm.table.cache_clear()


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    found = Probe()
    monkeypatch.setattr(gemm, "_probe", found)
    return found


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    path = gemm._cache_file()
    assert path.is_relative_to(tmp_path)
    return path


def next_process() -> dict[str, str]:
    gemm.table.cache_clear()
    return gemm.table()


def test_probed_once_and_read_again(file: Path, probe: Probe) -> None:
    assert gemm.table() == VERDICTS
    written = json.loads(file.read_text())
    assert written["providers"] == VERDICTS
    assert torch.__version__ in written["machine"]
    assert next_process() == VERDICTS
    assert gemm.table() == VERDICTS
    assert probe.runs == 1
    assert list(file.parent.iterdir()) == [file], "a temporary file is left"


def test_the_file_is_believed(file: Path, probe: Probe) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"providers": {"float32": gemm.ATEN}}))
    assert gemm.table() == {"float32": gemm.ATEN}
    assert probe.runs == 0


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"{}", b"[]", b"null", b"17", b'"x"', b"\xff\xfe\x00"),
        *(b'{"providers": null}', b'{"providers": 3}', b'{"providers": "x"}'),
    ],
)
def test_a_corrupt_file_is_replaced(content: bytes, file: Path, probe: Probe) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert gemm.table() == VERDICTS
    assert next_process() == VERDICTS
    assert probe.runs == 1
    assert json.loads(file.read_text())["providers"] == VERDICTS


def test_an_unwritable_cache_costs_only_a_probe(file: Path, probe: Probe) -> None:
    file.parent.parent.mkdir(parents=True, exist_ok=True)
    file.parent.write_text("a file stands where the folder should be")
    assert gemm.table() == VERDICTS
    assert next_process() == VERDICTS
    assert probe.runs == 2


def test_a_directory_in_place_of_the_file(file: Path, probe: Probe) -> None:
    (file / "in the way").mkdir(parents=True)
    assert gemm.table() == VERDICTS


def test_each_machine_version_and_thread_count_has_its_own_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {file}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        files.add(gemm._cache_file())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        files.add(gemm._cache_file())
    with monkeypatch.context() as patch:
        patch.setattr(gemm, "cpu_name", lambda: "another CPU @ 3 GHz / x")
        files.add(gemm._cache_file())
    assert len(files) == 4
    assert all(path.parent == file.parent for path in files)


def test_small_products_stay_with_aten(file: Path, probe: Probe) -> None:
    assert gemm.provider(CPU, torch.float32, gemm.MIN_FLOP - 1) == gemm.ATEN
    assert probe.runs == 0
    assert gemm.provider(CPU, torch.float32, gemm.MIN_FLOP) == gemm.ONEDNN
    assert gemm.provider(CPU, torch.float32, None) == gemm.ONEDNN


def test_verdicts_are_per_dtype_and_epilogue(file: Path, probe: Probe) -> None:
    assert gemm.provider(CPU, torch.float32, LARGE) == gemm.ONEDNN
    assert gemm.provider(CPU, torch.float32, LARGE, with_activation=True) == gemm.ATEN
    for dtype in (torch.float64, torch.bfloat16, torch.int8):
        assert gemm.provider(CPU, dtype, LARGE) == gemm.ATEN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_devices_stay_with_aten(dtype: torch.dtype, probe: Probe) -> None:
    for device in ("cuda", "meta", "mps"):
        assert gemm.provider(torch.device(device), dtype, LARGE) == gemm.ATEN
    assert probe.runs == 0


@pytest.mark.parametrize("flop", [None, 10, LARGE])
def test_float16_without_hardware_never_reaches_the_scalar_loop(
    flop: int | None, monkeypatch: pytest.MonkeyPatch, file: Path, probe: Probe
) -> None:
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: False)
    assert gemm.provider(CPU, torch.float16, flop) == gemm.VIA_FLOAT32
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: True)
    assert gemm.provider(CPU, torch.float16, flop) == gemm.ATEN


def test_without_onednn_nothing_is_probed(monkeypatch: pytest.MonkeyPatch, file: Path, probe: Probe) -> None:
    monkeypatch.setattr(compat, "onednn_linear", lambda: None)
    assert gemm.table() == {}
    assert gemm.provider(CPU, torch.float32, LARGE) == gemm.ATEN
    assert probe.runs == 0
    assert not file.exists()


def assert_is_a_table(table: dict[str, str]) -> None:
    assert {"float32", "float32+activation"} <= set(table)
    assert set(table.values()) <= {gemm.ATEN, gemm.ONEDNN}


def test_the_real_probe(file: Path) -> None:
    before = torch.get_rng_state()
    assert_is_a_table(gemm.table())
    assert next_process() == gemm.table()
    assert torch.equal(torch.get_rng_state(), before), "the probe draws from the user's generator"


def test_the_probe_works_in_the_middle_of_a_trace(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fake tensors, proxies and autocast active it still multiplies real float32 matrices."""
    seen = []
    real = gemm._median_ratio

    def watched(slow: object, fast: object) -> float:
        result = slow()
        outputs = result if isinstance(result, tuple) else (result,)
        seen.extend((type(output), output.dtype) for output in outputs)
        return real(slow, fast)

    monkeypatch.setattr(gemm, "_median_ratio", watched)
    found = []

    def traced(x: torch.Tensor) -> torch.Tensor:
        gemm.table.cache_clear()
        found.append(gemm.table())
        return x + 1

    with torch.autocast("cpu", torch.bfloat16), torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()):
        found.append(gemm.table())
    torch.fx.experimental.proxy_tensor.make_fx(traced, tracing_mode="symbolic")(torch.ones(3))
    assert len(found) == 2
    for table in found:
        assert_is_a_table(table)
    assert {kind for kind, _ in seen} == {torch.Tensor}
    assert torch.float32 in {dtype for _, dtype in seen}


def test_a_tie_goes_to_aten(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for gain, chosen in ((gemm.MIN_GAIN, gemm.ATEN), (gemm.MIN_GAIN + 0.01, gemm.ONEDNN), (0.5, gemm.ATEN)):
        monkeypatch.setattr(gemm, "_median_ratio", lambda slow, fast, gain=gain: gain)
        assert set(gemm._probe().values()) == {chosen}


def test_the_ratio_is_that_of_the_times() -> None:
    import time

    ratio = gemm._median_ratio(lambda: time.sleep(0.004), lambda: time.sleep(0.001))
    assert 2 < ratio < 6
