"""The section of a page, or a README, that shows runs: one, or those of several processors side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from fuse_pass.bench.results import Result, Run
from fuse_pass.bench.tables import tables
from fuse_pass.bench.targets import FIGURES, VS_BEST, VS_EAGER
from fuse_pass.commands.errors import CommandError

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def text(runs: Sequence[Run], table_format: str) -> str:
    """One run, or several: what they have in common side by side, then each below its processor's name."""
    if len(runs) == 1:
        return tables(runs[0], table_format)
    parts = [_side_by_side(runs, table_format)] + [f"## {_name(run)}\n\n{tables(run, table_format)}" for run in runs]
    return "\n\n".join(part for part in parts if part)


def _name(run: Run) -> str:
    machine = run.machine
    return f"{machine['cpu']} ({machine['instructions']}), {machine['date']}"


def _side_by_side(runs: Sequence[Run], table_format: str) -> str:
    """The rows that two runs or more have, in the order of the first; empty where there is none."""
    by_name = [{result.name: result for result in run.results if not result.is_cost} for run in runs]
    names = [name for name in dict.fromkeys(itertools.chain(*by_name)) if sum(name in rows for rows in by_name) > 1]
    if not names:
        return ""
    headers = ["how many times faster", *(f"{figure}, {_name(run)}" for run in runs for figure in (VS_EAGER, VS_BEST))]
    lines = [[name, *itertools.chain(*(_pair(rows.get(name)) for rows in by_name))] for name in names]
    return tabulate(lines, headers=headers, tablefmt=table_format, disable_numparse=True)


def _pair(result: Result | None) -> Iterator[str]:
    for figure in (VS_EAGER, VS_BEST):
        value = None if result is None else FIGURES[figure](result)
        yield "–" if value is None else f"{value:.2f}×"


def with_section(page: str, *runs: Run) -> str:
    """The text of a page with runs between its two markers.

    Raises:
        CommandError: the markers are not there, once and in order.
    """
    before, after = _around(page)
    return f"{before}{BEGIN}\n\n{text(runs, 'github')}\n\n{END}{after}"


def require(page: Path) -> None:
    """Checks that a page has a place for a run.

    Raises:
        CommandError: it cannot be read, or the markers are not there.
    """
    _around(_read(page))


def _around(page: str) -> tuple[str, str]:
    """What stands before and after the markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise CommandError(f"expected one line {BEGIN} and below it one line {END}; put them where the figures belong")
    return before, after


def rewrite(page: Path, *runs: Run) -> None:
    """Puts runs into the file of a page."""
    page.write_text(with_section(_read(page), *runs))


def _read(page: Path) -> str:
    try:
        return page.read_text()
    except OSError as error:
        raise CommandError(f"cannot read {page}: {error.strerror}") from error
