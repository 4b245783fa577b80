"""The table of `--against`: what others take for the same, and how far their results and ours are from float64."""

from __future__ import annotations

from tabulate import tabulate

from fuse_pass.bench.results import EAGER, OURS, Result

_NOTHING = "–"
_MOST_NAMES = 3
LEGEND = """\
Milliseconds; × is the contender's time by ours, so that above 1 fuse_pass is faster. In brackets: the error of the
results against float64, relative. `×` in the last column: the fastest contender's. Rows of b1.58 are compared with
int8, as nobody else has such weights. * in a process of its own, compared through eager PyTorch there and here."""


def milliseconds(result: Result, name: str) -> str:
    """Of one contender, the median."""
    value = result.seconds[name].median * 1e3
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def tables(results: list[Result], table_format: str) -> list[str]:
    """The table, its legend and why somebody is missing; nothing where nobody was asked for."""
    shown = [result for result in results if result.errors]
    if not shown:
        return []
    names = sorted({name for result in shown for name in (*result.others, *result.absent)})
    rows = [_row(result, names) for result in shown]
    headers = ["row", EAGER, OURS, *names, "× best"]
    aligned = ("left", *("right",) * (len(headers) - 1))
    table = tabulate(rows, headers=headers, tablefmt=table_format, disable_numparse=True, colalign=aligned)
    return [table, LEGEND, *_reasons(shown)]


def _row(result: Result, names: list[str]) -> list[str]:
    best = min(result.others.values(), default=None)
    return [
        result.name,
        *(f"{milliseconds(result, name)} ({result.errors[name]:.1e})" for name in (EAGER, OURS)),
        *(_cell(result, name) for name in names),
        _NOTHING if best is None else f"{best:.2f}×",
    ]


def _cell(result: Result, name: str) -> str:
    if name not in result.others:
        return _NOTHING
    mark = "*" if name in result.eager_apart else ""
    return f"{milliseconds(result, name)}{mark} {result.others[name]:.2f}× ({result.errors[name]:.1e})"


def _listed(rows: list[str]) -> str:
    return ", ".join(rows) if len(rows) <= _MOST_NAMES else f"{len(rows)} rows"


def _reasons(results: list[Result]) -> list[str]:
    """Who is missing where, and why: a line for every reason."""
    rows: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result.absent.items():
            rows.setdefault((name, reason), []).append(result.name)
    lines = [f"- {name} {reason}: {_listed(where)}" for (name, reason), where in sorted(rows.items())]
    return ["\n".join(["Not taking part:", "", *lines])] if lines else []
