"""The command with `--against`: times and errors beside ours, in the file and in the table."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from fuse_pass.bench import command, measure, results, roofline
from fuse_pass.bench.against import table
from fuse_pass.bench.against.apart import Apart
from fuse_pass.bench.against.contender import FLOAT, INT8, Contender, Task
from fuse_pass.bench.models import mlp
from fuse_pass.bench.packed import PackedRow
from fuse_pass.bench.rows import ROWS
from fuse_pass.cli import main
from fuse_pass.commands.errors import CommandError
from fuse_pass.commands.named_models import Example
from tests.bench.against import fakes

ROOT = Path(__file__).parents[3]
ROW = "tiny/dense_act_dense/1x32x128/fp32/infer"
PACKED = PackedRow("numbers/packed/int8/tiny", "int8", lambda: Example(mlp(32, 64), (torch.randn(3, 32),)))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(command, "warm_up", lambda device: None)
    monkeypatch.setattr(roofline, "_SHAPES", ((64, 96, 128),))
    known = (
        Contender("exact", (), "exact", {FLOAT: fakes.as_it_is}),
        Contender("rounded", (), "rounded", {FLOAT: fakes.off_by(1e-4), INT8: fakes.off_by(0.03)}),
        Contender("broken", (), "broken", {FLOAT: fakes.failing, INT8: fakes.failing}),
        Contender("apart", (), "apart", {INT8: fakes.failing}, is_apart=True),
    )
    chosen = table.chosen
    monkeypatch.setattr(table, "chosen", lambda names: chosen(names, known))
    lines = [dataclasses.replace(row, autotune=False) for row in ROWS if row.name == ROW]
    monkeypatch.setattr(command, "LINES", (*lines, PACKED))


def measured(tmp_path: Path, names: str, *rows: str) -> list[results.Result]:
    file = tmp_path / "run.json"
    assert main(["bench", *rows, "--seconds", "0", "--against", names, "--json", str(file), "--format", "github"]) == 0
    return results.read(file).results


def test_times_and_errors_beside_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = measured(tmp_path, "exact,rounded,broken", ROW)
    assert {"eager", "fuse_pass", "exact", "rounded"} <= set(found.seconds)
    assert found.seconds["exact"].median > 0
    assert set(found.errors) == {"eager", "fuse_pass", "exact", "rounded"}
    assert found.errors["rounded"] == pytest.approx(1e-4, rel=0.01)
    assert 0 < found.errors["fuse_pass"] < 1e-6
    assert set(found.others) == {"exact", "rounded"}
    assert found.absent == {"broken": "RuntimeError: no kernel for this"}
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.startswith(f"| {ROW}") and "(1.0e-04)" in line)
    assert f"({found.errors['fuse_pass']:.1e})" in line
    assert f"{min(found.others.values()):.2f}×" in line.rpartition("|")[0].rpartition("|")[2]
    assert f"- broken RuntimeError: no kernel for this: {ROW}" in printed


def test_a_row_that_is_nobodys() -> None:
    def refused() -> Task:
        raise CommandError("is for inference only")

    settings = measure.Settings("cpu", 1, 0.0, [fakes.contender(fakes.as_it_is)], lambda word: None)
    found = measure._others(refused, {}, settings)
    assert found.absent == {"fake": "is for inference only"}
    assert (found.calls, found.errors, found.apart) == ({}, {}, ())


def test_packed_weights(tmp_path: Path) -> None:
    (found,) = measured(tmp_path, "exact,rounded", PACKED.name)
    assert list(found.seconds)[:2] == ["fuse_pass", "eager"]
    assert found.baseline == "eager"
    assert set(found.others) == {"rounded"}
    assert found.errors["rounded"] == pytest.approx(0.03, rel=0.01)
    assert 1e-3 < found.errors["fuse_pass"] < 0.05
    assert found.absent == {"exact": "has nothing for int8"}


def test_another_process_is_compared_through_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def apart(name: str, row: str, threads: int, seconds: float) -> Apart:
        asked.append((name, row))
        return Apart({"apart": [2.0, 2.0, 2.0], "eager": [8.0, 8.0, 8.0]}, 2e-5)

    monkeypatch.setattr(measure, "measured_apart", apart)
    (found,) = measured(tmp_path, "apart", PACKED.name)
    assert asked == [("apart", PACKED.name)]
    assert found.seconds["apart"].median == 2.0
    assert found.eager_apart == {"apart": 8.0}
    assert found.time_by_ours["apart"] == pytest.approx(found.time_by_ours["eager"] / 4, rel=1e-2)
    assert found.errors["apart"] == 2e-5


def test_another_process_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(*_: object) -> Apart:
        raise CommandError("its process ended with 1, saying no")

    monkeypatch.setattr(measure, "measured_apart", apart)
    (found,) = measured(tmp_path, "apart", PACKED.name)
    assert found.absent == {"apart": "its process ended with 1, saying no"}


def test_only_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", ROW, "--against", "exact", "--device", "cuda"]) == 2
    assert "--against: expected --device cpu, where contenders run; got cuda" in capsys.readouterr().err
