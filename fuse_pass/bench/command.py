"""`bench`: fuse_pass against `torch.compile` and eager PyTorch, alternating in one process."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Callable, Mapping

import torch
from tabulate import tabulate_formats

from fuse_pass.bench import numbers, pass_time, plot, results, roofline, tables
from fuse_pass.bench.contenders import contenders, warm_up
from fuse_pass.bench.numbers import Cost
from fuse_pass.bench.results import EAGER, OURS, STOCK, Result, Run
from fuse_pass.bench.rows import ROWS, Row, rows_of
from fuse_pass.commands import timing
from fuse_pass.commands.arguments import DEFAULT_ROWS, GROUPS
from fuse_pass.commands.errors import CommandError
from fuse_pass.commands.named_models import reference_models

COSTS = (*numbers.COSTS, *pass_time.COSTS)
_COPIED_BYTES = 1 << 28


def run(options: argparse.Namespace) -> None:
    _check(options)
    if options.source is not None:
        _show(results.read(options.source), options)
        return
    rows, costs = _selected(options)
    if options.list:
        print("\n".join([row.name for row in rows] + [cost.name for cost in costs]))
        return
    with timing.threads(options.threads):
        _show(_measured(rows, costs, options), options)


def _check(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if options.threads < 1:
        raise CommandError(f"--threads: expected 1 or more, got {options.threads}")
    if options.seconds < 0:
        raise CommandError(f"--seconds: expected 0 or more, got {options.seconds:g}")
    if options.format not in tabulate_formats:
        raise CommandError(f"--format: expected one of {', '.join(tabulate_formats)}; got {options.format!r}")
    for name, file in (("--json", options.json), ("--plot", options.plot)):
        if file is not None and not file.absolute().parent.is_dir():
            raise CommandError(f"{name}: expected a file in a folder that exists, got {file}; create the folder first")
    if options.plot is not None:
        plot.require(options.plot)
    if options.readme is not None:
        tables.require(options.readme)


def _selected(options: argparse.Namespace) -> tuple[list[Row], list[Cost]]:
    own = list(rows_of(options.model)) if options.model else []
    wanted = options.rows or ([] if own else DEFAULT_ROWS)
    globs = [glob for word in wanted for glob in GROUPS.get(word, (word,))]
    names = [row.name for row in ROWS] + [cost.name for cost in COSTS]
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise CommandError(
                f"expected a row, a glob or one of the groups {', '.join(GROUPS)}; got {glob!r}, which no row matches; "
                "bench --list all shows every row"
            )

    def is_wanted(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    rows = [row for row in ROWS if is_wanted(row.name)]
    costs = [cost for cost in COSTS if is_wanted(cost.name)]
    if any(row.is_reference for row in rows) or any(cost.is_reference for cost in costs):
        reference_models()  # says at once that they are not here
    for cost in costs:
        if not cost.is_available:
            _say(f"{cost.name} is left out: it needs {cost.needs} (pip install {cost.needs})\n")
    return own + rows, [cost for cost in costs if cost.is_available]


def _measured(rows: list[Row], costs: list[Cost], options: argparse.Namespace) -> Run:
    _say("warming up: the first compilation in a process takes longer …\n")
    warm_up(options.device)
    with timing.pinned(options.threads):
        rates = roofline.product_rates((row.product_dtype for row in rows), options.device)
        copy_rate = roofline.copy_rate(_COPIED_BYTES, options.device)
    names = {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()}
    result = Run(timing.machine(options.device, options.threads), names, copy_rate, [])
    measure: list[tuple[str, Callable[[], Result]]] = [
        *((row.name, lambda row=row: _compared(row, rates[row.product_dtype], options)) for row in rows),
        *((cost.name, lambda cost=cost: _priced(cost, options)) for cost in costs),
    ]
    for number, (name, one) in enumerate(measure, 1):
        _say(f"[{number}/{len(measure)}] {name}: ")
        torch.compiler.reset()
        torch.manual_seed(0)
        try:
            result.results.append(one())
        except CommandError as error:
            if number == len(measure) and not result.results:
                raise
            _say(f"left out: {error}\n")
        if options.json is not None:  # after every row, so that an interrupted run leaves what it has
            results.write(result, options.json)
    return result


def _compared(row: Row, rate: float, options: argparse.Namespace) -> Result:
    found = contenders(row, options.device, lambda word: _say(f"{word}, "))
    eager = found.steps[EAGER]
    with timing.pinned(options.threads):
        limit = roofline.limit(eager, rate, options.device)
        samples = timing.alternate(found.steps, options.seconds)
    result = Result(
        row.name,
        row.train,
        **results.timed(samples),
        limit_seconds=limit.seconds if limit.is_meaningful else None,
        limited_by=limit.by if limit.is_meaningful else None,
        saved_bytes={name: step.saved_bytes() for name, step in found.steps.items()} if row.train else {},
        first_call_seconds=found.first_call_seconds,
        fused=dict(found.report.counts()),
        declined=len(found.report.declines),
    )
    _say(f"{result.time_by_ours[STOCK]:.2f}× torch.compile\n")
    return result


def _priced(cost: Cost, options: argparse.Namespace) -> Result:
    ours, baseline = cost.build(options.device)
    calls: Mapping[str, Callable[[], object]] = {OURS: ours, cost.baseline: baseline}
    for call in calls.values():
        call()
    with timing.pinned(options.threads):
        samples = timing.alternate(calls, options.seconds, cost.rounds)
    result = Result(cost.name, train=False, **results.timed(samples))
    _say(f"takes {1 / result.time_by_ours[cost.baseline]:.2f}× {cost.baseline}\n")
    return result


def _show(result: Run, options: argparse.Namespace) -> None:
    for row in result.results:
        if options.model is not None and row.name.startswith(options.model):
            print(_what_was_fused(row))
    print(tables.tables(result, options.format))
    if options.plot is not None:
        plot.draw(result, options.plot)
    if options.readme is not None:
        tables.rewrite(options.readme, result)


def _what_was_fused(result: Result) -> str:
    fused = ", ".join(f"{count} × {name}" for name, count in sorted(result.fused.items())) or "nothing"
    advice = "; `explain` says why" if result.declined else ""
    return f"{result.name}: fused {fused}; declined {result.declined}{advice}\n"


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)
