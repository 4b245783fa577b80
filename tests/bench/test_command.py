"""The command `bench`, as typed."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from pathlib import Path

import pytest
import torch

from fuse_pass.bench import command, page, results, roofline
from fuse_pass.bench.rows import rows_of
from fuse_pass.cli import main
from tests.bench import sample

ROOT = Path(__file__).parents[2]
QUICK = "tiny/dropout_norm/1x32/fp32/train"


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warm-up, small products, no autotuning: the figures mean nothing, all else is the same."""
    monkeypatch.setattr(command, "warm_up", lambda device: None)
    monkeypatch.setattr(roofline, "_SHAPES", ((64, 96, 128),))
    monkeypatch.setattr(
        command, "rows_of", lambda name: [dataclasses.replace(row, autotune=False) for row in rows_of(name)]
    )


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["bench", "--list", *words]) == 0
    return capsys.readouterr().out.split()


def test_rows_by_name_glob_and_group(capsys: pytest.CaptureFixture[str]) -> None:
    everything = listed(capsys, "all")
    assert listed(capsys, QUICK) == [QUICK]
    assert listed(capsys, "*/train") == fnmatch.filter(everything, "*/train")
    assert listed(capsys, "bert/*", "numbers/training/*") == [
        "bert/fp32/infer", "bert/fp32/train", "bert/bf16-autocast/train", "numbers/training/bert/fp8_e4m3",
    ]  # fmt: skip
    assert len(listed(capsys, "ops")) == 20
    assert len(listed(capsys, "models")) == 24
    default = listed(capsys)
    assert set(default) < set(everything)
    assert {"bert/fp32/infer", QUICK, "dense_act_dense/4096x768x3072/bf16/train"} <= set(default)
    assert "numbers/fake_quantize/fp8_e4m3/nearest" in default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convolution"], "expected a row, a glob or one of the groups ops, transformers"),
        (["convolution"], "got 'convolution', which no row matches; bench --list all shows every row"),
        (["--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["--seconds", "-1"], "--seconds: expected 0 or more, got -1"),
        (["--format", "gothic"], "--format: expected one of"),
        (["--json", "no/such/folder/run.json"], "--json: expected a file in a folder that exists, got no/such/folder"),
        (["--plot", "chart.pdf"], "--plot: expected a file name that ends in .png"),
        (["--readme", "LICENSE"], "expected one line <!-- bench:begin --> and below it one line <!-- bench:end -->"),
        (["--from", "absent.json"], "cannot read absent.json"),
        (["--from", "a.json", "b.json", "--plot", "chart.png"], "--plot: expected one run to draw, got 2 by --from"),
        (["--against", "mine"], "--against: expected names among onnxruntime,openvino,zentorch,torchao,torch_dynamic,"),
        (["--against", "torch_dynamic,"], "separated by commas; got ''"),
        (["--model", "bert"], "expected package.module:function, got 'bert'"),
        (["--model", "absent:build"], "cannot load 'absent:build'"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_asked_for_and_absent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_a_row_is_measured_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    assert main(["bench", QUICK, "--seconds", "0.1", "--json", str(file), "--format", "github"]) == 0
    printed = capsys.readouterr()
    assert f"[1/1] {QUICK}: torch.compile" in printed.err
    run = results.read(file)
    (result,) = run.results
    assert result.name == QUICK
    assert result.train
    assert result.rounds >= 9
    assert set(result.seconds) == {"eager", "torch.compile", "fuse_pass"}
    assert all(0 < s.lower <= s.median <= s.upper < 1 for s in result.seconds.values())
    assert set(result.saved_bytes) == set(result.seconds)
    assert 0 < result.saved_bytes["fuse_pass"] < result.saved_bytes["eager"]
    assert set(result.first_call_seconds) == {"torch.compile", "fuse_pass"}
    assert result.fused == {"dropout_norm": 1}
    assert result.limit_seconds is None, "so small that the call itself is the limit"
    assert run.machine["torch"] == torch.__version__
    assert run.product_rates["float32"] > 0
    assert f"| {QUICK} " in printed.out
    assert f"torch {torch.__version__}" in printed.out


@pytest.mark.usefixtures("quick")
def test_a_cost_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    name = "numbers/fake_quantize/fp8_e4m3/nearest"
    assert main(["bench", name, "--seconds", "0", "--json", str(file)]) == 0
    (result,) = results.read(file).results
    assert set(result.seconds) == {"fuse_pass", "x * 2"}
    assert result.rounds == 9
    assert "takes" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_model_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench_user_model.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.mlp = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))\n"
        "    def forward(self, x, *, scale):\n"
        "        return {'y': self.mlp(x) * scale}\n"
        "def build():\n"
        "    return Mine(), (torch.randn(3, 8),), {'scale': torch.tensor(2.0)}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--model", "bench_user_model:build", "--seconds", "0", "--json", "run.json"]) == 0
    found = results.read(tmp_path / "run.json").results
    assert [result.name for result in found] == ["bench_user_model:build/infer", "bench_user_model:build/train"]
    assert [result.fused for result in found] == [{"dense_act_dense": 1}] * 2
    assert set(found[0].seconds) == {"eager", "torch.compile", "freezing", "fuse_pass"}
    assert "bench_user_model:build/train: fused 1 × dense_act_dense; declined 0" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_row_that_cannot_be_measured_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench_untrained_model.py").write_text(
        "import torch\ndef build():\n    return torch.nn.ReLU(), torch.ones(2, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--model", "bench_untrained_model:build", "--seconds", "0"]) == 0
    printed = capsys.readouterr()
    missing = "expected an output that depends on a parameter, got none to train"
    assert f"left out: bench_untrained_model:build/train: {missing}" in printed.err
    assert "bench_untrained_model:build/infer" in printed.out


def test_reference_models_are_asked_for_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "models", None)
    for rows in (["bert/*"], ["models"], ["numbers/training/*"]):
        assert main(["bench", *rows]) == 2
        assert "not in the installed package: run this in a checkout" in capsys.readouterr().err
    assert main(["bench", "--list", "ops"]) == 0


def test_a_run_is_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, readme = tmp_path / "run.json", tmp_path / "README.md"
    results.write(sample.run(), file)
    readme.write_text(f"{page.BEGIN}\n{page.END}\n")
    assert main(["bench", "--from", str(file), "--readme", str(readme), "--format", "github"]) == 0
    printed = capsys.readouterr().out
    assert printed == page.text([results.read(file)], "github") + "\n"
    assert printed in readme.read_text()


def test_a_cost_without_its_baseline_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["bench", "--list", "numbers"]) == 0
    printed = capsys.readouterr()
    assert "pychop" not in printed.out
    assert "numbers/fake_quantize/fp8_e5m2/pychop is left out: it needs pychop (pip install pychop)" in printed.err
