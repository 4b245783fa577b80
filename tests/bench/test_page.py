"""The section of a page that shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fuse_pass.bench.page import BEGIN, END, require, rewrite, text, with_section
from fuse_pass.bench.results import Run, read
from fuse_pass.bench.tables import tables
from fuse_pass.commands.errors import CommandError
from tests.bench import sample

ROOT = Path(__file__).parents[2]


def test_section_between_markers() -> None:
    run = sample.run()
    text = f"before\n{BEGIN}\nold figures\n{END}\nafter\n"
    replaced = with_section(text, run)
    assert replaced == f"before\n{BEGIN}\n\n{tables(run, 'github')}\n\n{END}\nafter\n"
    assert with_section(replaced, run) == replaced


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_markers_are_needed_once_and_in_order(text: str) -> None:
    with pytest.raises(CommandError, match="expected one line <!-- bench:begin -->"):
        with_section(text, sample.run())


def test_readme_file(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    for check in (lambda: require(readme), lambda: rewrite(readme, sample.run())):
        with pytest.raises(CommandError, match="cannot read"):
            check()
    readme.write_text(f"{BEGIN}\n")
    with pytest.raises(CommandError, match="expected one line"):
        require(readme)
    readme.write_text(f"{BEGIN}\n{END}\n")
    require(readme)
    rewrite(readme, sample.run())
    assert "tiny/bert/infer" in readme.read_text()


def test_several_runs_are_shown_side_by_side() -> None:
    first = sample.run()
    other = Run(first.machine | {"cpu": "Other CPU", "date": "2026-02-03"}, {}, 1e10, first.results[1:2])
    shown = text([first, other], "github")
    common, one, two = shown.split("\n## ")
    assert "× eager, Other CPU (AVX2), 2026-02-03" in common
    (line,) = (line for line in common.splitlines() if "dense_act_dense" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == ["2.08×", "1.04×"] * 2
    assert "tiny/bert/infer" not in common, "only one of them has it"
    assert one.startswith("Sample CPU (AVX2), 2026-01-02\n\n" + tables(first, "github"))
    assert two == "Other CPU (AVX2), 2026-02-03\n\n" + tables(other, "github")


def test_runs_without_a_common_row() -> None:
    first = sample.run()
    runs = [Run(first.machine, {}, 1e10, [result]) for result in first.results[:2]]
    assert text(runs, "github").startswith("## Sample CPU")


def committed() -> list[Path]:
    """The files that `make figures` names, in its order."""
    (line,) = re.findall(r"^RUNS := (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    return [ROOT / name for name in line.split()]


def test_the_page_shows_the_committed_runs() -> None:
    """`make figures` was run after the figures changed; and there are no figures that the page does not show."""
    assert sorted(committed()) == sorted((ROOT / "benchmarks").glob("*.json"))
    shown = (ROOT / "docs" / "benchmarks.md").read_text()
    assert with_section(shown, *map(read, committed())) == shown
