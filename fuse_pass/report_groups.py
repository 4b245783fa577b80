"""Rows of a report that say the same of layers that repeat, as one row: `encoder.layer.{0..11}.output`, 12 times."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_DIGITS = re.compile(r"_?\d+")


@dataclass(frozen=True)
class Group:
    """Rows that differ in the numbers of a path alone, and in those of names in a graph.

    Attributes:
        where: their paths as one.
        times: how many rows there are.
        cells: the other cells, of the first row.
    """

    where: str
    times: int
    cells: tuple[str, ...]


def grouped(rows: Iterable[tuple[str, tuple[str, ...], tuple[str, ...]]]) -> list[Group]:
    """Groups in the order of their first rows.

    Args:
        rows: of each the path, cells that must be the same, and cells that must be but for the numbers of nodes.
    """
    found: dict[tuple[str, ...], list[tuple[str, tuple[str, ...]]]] = {}
    for where, same, alike in rows:
        key = (_NUMBER.sub("#", where), *same, *(_DIGITS.sub("", cell) for cell in alike))
        found.setdefault(key, []).append((where, (*same, *alike)))
    return [Group(joined([where for where, _ in rows]), len(rows), rows[0][1]) for rows in found.values()]


def joined(paths: Sequence[str]) -> str:
    """Paths that differ in their numbers alone, as one: `layers.{0..3}.mlp`; a number that does not vary stays."""
    columns = list(zip(*(path.split(".") for path in paths), strict=True))
    return ".".join(column[0] if len(set(column)) == 1 else f"{{{_listed(column)}}}" for column in columns)


def _listed(numbers: Sequence[str]) -> str:
    """`0..3, 5` for 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for number in sorted({int(number) for number in numbers}):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
