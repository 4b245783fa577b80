"""Compiled artefacts survive the process, and no artefact of other sources or options is ever served."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fuse_pass

PACKAGE = Path(fuse_pass.__file__).parent

PROGRAM = """
import json, sys
import torch
from torch import nn
import fuse_pass
from fuse_pass.gemm import probe
from torch._dynamo.utils import counters

# Answers that are the same in every process, however busy the machine is.
probe.ask = lambda question: [probe.Round(0.5, None)]
probe.contradicts = lambda question, break_even: False

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 20), nn.Linear(20, 6), nn.LayerNorm(6)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x):
        return self.norm(x + self.dropout(self.down(nn.functional.gelu(self.up(x)))))

torch.manual_seed(0)
model, x = Block(), torch.randn(5, 6)
backend = fuse_pass.FuseBackend(**json.loads(sys.argv[1]))
y = torch.compile(model, backend=backend)(x)
(y * torch.arange(6.0)).sum().backward()
print(json.dumps({
    "aot": [counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("hit", "miss", "bypass")],
    "fx": [counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss", "bypass")],
    "sum": y.double().sum().item(),
    "grad": model.up.weight.grad.double().norm().item(),
}))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which one process has compiled the program, with the source tree that it used."""
    folder = tmp_path_factory.mktemp("caches")
    shutil.copytree(PACKAGE, folder / "sources" / "fuse_pass", ignore=shutil.ignore_patterns("__pycache__"))
    first = run(folder)
    assert first["aot"] == [0, 1, 0]
    assert first["fx"][0] == 0
    (folder / "first.json").write_text(json.dumps(first))
    return folder


def run(folder: Path, *, capability: str | None = None, **options: Any) -> dict[str, Any]:
    """Runs the program in a new process that imports the copied sources and uses the cache in `folder`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "sources"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "OMP_NUM_THREADS": "1",
    }
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    command = [sys.executable, "-c", PROGRAM, json.dumps(options)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return parsed


def test_a_second_process_hits_and_computes_the_same(cache: Path) -> None:
    first, second = json.loads((cache / "first.json").read_text()), run(cache)
    assert second["aot"] == [1, 0, 0]
    assert second["fx"] == [2, 0, 0], "forward and backward"
    assert (second["sum"], second["grad"]) == (first["sum"], first["grad"])


def test_another_option_misses(cache: Path) -> None:
    assert run(cache, patterns=["dense_act_dense"])["aot"][0] == 0
    assert run(cache, strict=True)["aot"][0] == 0


def test_a_changed_source_file_misses(cache: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(cache, changed)
    source = changed / "sources" / "fuse_pass" / "numerics" / "random_bits.py"
    source.write_text(source.read_text() + "\n# another version\n")
    after = run(changed)
    assert after["aot"][0] == 0
    assert after["fx"][0] == 0


@pytest.mark.processor
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the vectors of other processors have one size"
)
def test_another_processor_misses(cache: Path) -> None:
    """The width of a vector is in the sources that Inductor keeps: compiled for another width they are wrong."""
    other = "default" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "avx2"
    first, there = json.loads((cache / "first.json").read_text()), run(cache, capability=other)
    assert there["aot"][0] == 0
    assert there["fx"][0] == 0
    assert there["sum"] == pytest.approx(first["sum"], abs=1e-4)
    assert there["grad"] == pytest.approx(first["grad"], rel=1e-4)


PRECOMPILED = PROGRAM.replace(".sum().backward()", ".sum().backward(); torch.compiler.save_cache_artifacts()").replace(
    '    "fx":',
    '    "dynamo": dict(counters["dynamo_cache"]), "graphs": counters["stats"]["unique_graphs"],\n    "fx":',
)


@pytest.fixture
def precompiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for programs that precompile."""
    monkeypatch.setenv("TORCH_CACHING_PRECOMPILE", "1")
    monkeypatch.setitem(globals(), "PROGRAM", PRECOMPILED)
    shutil.copytree(PACKAGE, tmp_path / "sources" / "fuse_pass", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.slow
def test_precompiled_functions_are_found_until_the_sources_change(precompiling: Path) -> None:
    first, second = run(precompiling), run(precompiling)
    assert first["graphs"] == 1
    assert second["graphs"] == 0
    assert second["dynamo"] == {"dynamo_cache_hit": 1}
    assert (second["sum"], second["grad"]) == (first["sum"], first["grad"])
    with pytest.raises(AssertionError, match="expected this call to run a quantised graph, got none"):
        run(precompiling, quantize="fp8_e4m3")  # which PyTorch takes for the same function
    source = precompiling / "sources" / "fuse_pass" / "numerics" / "random_bits.py"
    source.write_text(source.read_text() + "\n# another version\n")
    after = run(precompiling)
    assert after["graphs"] == 1
    assert after["dynamo"] == {"dynamo_cache_error": 1}


@pytest.mark.slow
def test_quantized_functions_are_not_precompiled(precompiling: Path) -> None:
    first, second = (run(precompiling, quantize="fp8_e4m3") for _ in range(2))
    assert first["graphs"] == second["graphs"] == 1
    assert (second["sum"], second["grad"]) == (first["sum"], first["grad"])
