"""A run as a file: what is written is read again, and nothing else is taken for a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fuse_pass.bench.results import Spread, read, timed, write
from fuse_pass.commands.errors import CommandError
from tests.bench import sample


def test_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    write(sample.run(), file)
    content = json.loads(file.read_text())
    assert {"copy_rate_bytes_per_second", "product_rates_flop_per_second"} <= set(content)
    assert {"seconds", "saved_bytes", "first_call_seconds", "limit_seconds"} <= set(content["results"][0])
    again = read(file)
    assert again.machine == sample.MACHINE
    for ours, written in zip(again.results, sample.run().results, strict=True):
        assert ours.name == written.name
        assert ours.saved_bytes == written.saved_bytes
        assert ours.time_by_ours == pytest.approx(written.time_by_ours, rel=1e-3)
        assert ours.seconds.keys() == written.seconds.keys()
        assert all(ours.seconds[n].upper == pytest.approx(written.seconds[n].upper, rel=1e-3) for n in ours.seconds)
    other = tmp_path / "again.json"
    write(again, other)
    assert other.read_text() == file.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "expected what bench --json writes"),
        ("{}", "expected what bench --json writes, got something else"),
        ('{"version": 0}', "expected version 1, got 0; run bench again"),
        ('{"version": 1, "results": [{"name": "a"}]}', "expected what bench --json writes"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(CommandError, match=message):
        read(file)


def test_absent_file() -> None:
    with pytest.raises(CommandError, match=r"cannot read absent.json: .*; bench --json absent.json writes it"):
        read(Path("absent.json"))


def test_samples_become_medians_quartiles_and_ratios() -> None:
    fields = timed({"fuse_pass": [1.0, 2.0, 3.0, 4.0, 5.0], "eager": [3.0, 6.0, 6.0, 8.0, 30.0]})
    assert fields["rounds"] == 5
    assert fields["seconds"]["fuse_pass"] == Spread(3.0, 2.0, 4.0)
    assert fields["time_by_ours"] == {"eager": 3.0}


def test_best_setting_and_baseline() -> None:
    train, infer, tiny, cost = sample.run().results
    assert train.best_compiled == "torch.compile"
    assert infer.best_compiled == "max-autotune"
    assert tiny.best_compiled == "torch.compile", "freezing was slower"
    assert cost.best_compiled is None
    assert [result.is_cost for result in (train, infer, tiny, cost)] == [False, False, False, True]
    assert cost.baseline == "x * 2"
