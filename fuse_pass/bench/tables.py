"""The tables of a run."""

from __future__ import annotations

from tabulate import tabulate

from fuse_pass.bench import others
from fuse_pass.bench.others import milliseconds
from fuse_pass.bench.results import EAGER, OURS, STOCK, Result, Run
from fuse_pass.bench.targets import VS_STOCK, Outcome, outcomes
from fuse_pass.commands import timing

_NOTHING = "–"
LEGEND = """\
Milliseconds are medians over rounds in which every contender ran once (train: forward and backward); × is how many
times faster fuse_pass is, the median over rounds. `best setting` is shown where torch.compile is faster with freezing,
or with freezing and max-autotune (inference only), than as it is. `of limit`: the time in which this machine could do
it at best, by the rates below, divided by ours. `saved`: MB kept from forward to backward, fuse_pass / eager.
`first call`: seconds from empty caches, fuse_pass / torch.compile."""


def tables(run: Run, table_format: str) -> str:
    """Every table of a run, with the machine."""
    speeds = [result for result in run.results if not result.is_cost]
    costs = [result for result in run.results if result.is_cost]
    parts = []
    if speeds:
        parts += [_speed_table(speeds, table_format), LEGEND]
    if costs:
        parts.append(_cost_table(costs, table_format))
    parts += others.tables(run.results, table_format)
    judged = list(outcomes(run.results, run.machine["instructions"]))
    if judged:
        parts.append(_target_table(judged, table_format))
    return "\n\n".join([*parts, f"Measured on {timing.described(run.machine)}; {_rates(run)}."])


def _rates(run: Run) -> str:
    products = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in run.product_rates.items())
    return f"rates in this run: copy {run.copy_rate / 1e9:.1f} GB/s" + (f", products {products}" if products else "")


def _speed_table(results: list[Result], table_format: str) -> str:
    headers = [
        "row", EAGER, STOCK, "best setting", OURS, "× eager", VS_STOCK, "× best", "of limit", "saved", "first call",
    ]  # fmt: skip
    rows = [_speed_row(result) for result in results]
    return tabulate(
        rows, headers=headers, tablefmt=table_format, disable_numparse=True, colalign=("left", *("right",) * 10)
    )


def _speed_row(result: Result) -> list[str]:
    best = result.best_compiled
    assert best is not None, "only rows that torch.compile has a part in"
    share = result.share_of_limit
    return [
        result.name,
        *(milliseconds(result, name) for name in (EAGER, STOCK)),
        _NOTHING if best == STOCK else f"{milliseconds(result, best)} {best}",
        milliseconds(result, OURS),
        *(f"{result.time_by_ours[name]:.2f}×" for name in (EAGER, STOCK, best)),
        _NOTHING if share is None else f"{share:.0%}",
        _pair(result.saved_bytes, EAGER, 1e6, 2),
        _pair(result.first_call_seconds, STOCK, 1, 1),
    ]


def _pair(values: dict[str, int] | dict[str, float], other: str, unit: float, digits: int) -> str:
    if OURS not in values or other not in values:
        return _NOTHING
    return " / ".join(f"{values[name] / unit:.{digits}f}" for name in (OURS, other))


def _cost_table(results: list[Result], table_format: str) -> str:
    rows = [
        [
            result.name,
            milliseconds(result, OURS),
            result.baseline,
            milliseconds(result, result.baseline),
            f"{1 / result.time_by_ours[result.baseline]:.2f}×",
        ]
        for result in results
    ]
    headers = ["cost", OURS, "against", "baseline", "takes"]
    return tabulate(
        rows,
        headers=headers,
        tablefmt=table_format,
        disable_numparse=True,
        colalign=("left", "right", "left", "right", "right"),
    )


def _target_table(judged: list[list[Outcome]], table_format: str) -> str:
    rows = []
    for found in judged:
        worst, reached = found[0], sum(outcome.is_reached for outcome in found)
        rows.append(
            [worst.target.rows, worst.target.text, f"{reached} of {len(found)}", worst.result.name,
             f"{worst.value:.2f}", _verdict(worst)]
        )  # fmt: skip
    headers = ["target", "aim", "reached", "furthest from it", "got", "verdict"]
    return tabulate(rows, headers=headers, tablefmt=table_format, disable_numparse=True)


def _verdict(outcome: Outcome) -> str:
    if outcome.is_reached:
        return "reached"
    share, possible = outcome.result.share_of_limit, outcome.possible
    if share is None or possible is None:
        return "not reached"
    if possible < outcome.target.bound:
        return f"beyond the limit, which allows {possible:.2f} ({share:.0%} of it reached)"
    return f"not reached; {share:.0%} of the limit"
