"""The check for machines with a GPU, tried on a CPU: every section gives rows, and failures are told as rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fuse_pass.testing.cuda_check import __main__ as check
from fuse_pass.testing.cuda_check import sections
from fuse_pass.testing.cuda_check.sections import SECTIONS, Row, Scale

CPU = torch.device("cpu")


def rows_of(section: str) -> list[Row]:
    return list(SECTIONS[section](Scale.small(CPU)))


@pytest.mark.parametrize("section", ["versions", pytest.param("bits", marks=pytest.mark.slow), "low_precision"])
def test_a_section_is_right_on_a_cpu(section: str) -> None:
    rows = rows_of(section)
    assert rows
    assert [row for row in rows if not row["ok"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("section", ["results", "norms", "blocks", "layers"])
def test_a_long_section_gives_rows(section: str) -> None:
    """Its times are those of a CPU, and say nothing."""
    rows = rows_of(section)
    assert rows
    assert all({"case", "ok"} <= set(row) for row in rows)
    if section == "results":
        assert [row for row in rows if not row["ok"]] == []
    if section == "layers":
        assert all(row["losses"]["ours"][-1] < row["losses"]["ours"][0] for row in rows)


def test_rows_are_written_as_they_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"

    def section(scale: Scale) -> Iterator[Row]:
        yield {"case": "first", "ok": True}
        assert json.loads(path.read_text())["case"] == "first"
        raise ValueError("what it was")

    def other(scale: Scale) -> Iterator[Row]:
        yield {"case": "next", "ok": True}

    monkeypatch.setattr(check, "SECTIONS", {"some": section, "other": other})
    assert check.main(["--device", "cpu", "--small", "--json", str(path)]) == 1
    first, failed, following = map(json.loads, path.read_text().splitlines())
    assert (first["section"], first["ok"]) == ("some", True)
    assert not failed["ok"]
    assert "what it was" in failed["error"]
    assert following["case"] == "next"


def test_time_that_is_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SECTIONS", {"versions": sections.versions, "bits": sections.bits})
    first, last = check.rows(["versions", "bits"], Scale.small(CPU), seconds=-1)
    assert first["ok"]
    assert "no time left" in last["error"]


def test_without_a_device_it_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        check.main([])
    assert "--device cpu --small" in capsys.readouterr().err
