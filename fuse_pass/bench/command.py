"""`bench`: fuse_pass against `torch.compile` and eager PyTorch, alternating in one process."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from importlib.util import find_spec
from typing import TypeAlias

import torch
from tabulate import tabulate_formats

from fuse_pass.bench import measure, numbers, page, pass_time, plot, results, roofline
from fuse_pass.bench.against import table
from fuse_pass.bench.contenders import warm_up
from fuse_pass.bench.numbers import Cost
from fuse_pass.bench.packed import PACKED_ROWS, PackedRow
from fuse_pass.bench.results import Result, Run
from fuse_pass.bench.rows import ROWS, Row, rows_of
from fuse_pass.commands import timing
from fuse_pass.commands.arguments import DEFAULT_ROWS, GROUPS
from fuse_pass.commands.errors import CommandError
from fuse_pass.commands.named_models import reference_models

COSTS = (*numbers.COSTS, *pass_time.COSTS)
_Line: TypeAlias = Row | PackedRow | Cost
LINES: tuple[_Line, ...] = (*ROWS, *PACKED_ROWS, *COSTS)
_COPIED_BYTES = 1 << 28


def run(options: argparse.Namespace) -> None:
    _check(options)
    if options.source is not None:
        _show([results.read(file) for file in options.source], options)
        return
    lines = _selected(options)
    if options.list:
        print("\n".join(line.name for line in lines))
        return
    with timing.threads(options.threads):
        _show([_measured(lines, options)], options)


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
        if len(options.source or ()) > 1:
            raise CommandError(f"--plot: expected one run to draw, got {len(options.source)} by --from")
    if options.readme is not None:
        page.require(options.readme)
    if options.against is not None:
        if options.device != "cpu":
            raise CommandError(f"--against: expected --device cpu, where contenders run; got {options.device}")
        table.chosen(options.against)


def _selected(options: argparse.Namespace) -> list[_Line]:
    own = list(rows_of(options.model)) if options.model else []
    wanted = options.rows or ([] if own else DEFAULT_ROWS)
    globs = [glob for word in wanted for glob in GROUPS.get(word, (word,))]
    names = [line.name for line in LINES]
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise CommandError(
                f"expected a row, a glob or one of the groups {', '.join(GROUPS)}; got {glob!r}, which no row matches; "
                "bench --list all shows every row"
            )
    lines = [line for line in LINES if any(fnmatch.fnmatchcase(line.name, glob) for glob in globs)]
    if any(line.is_reference for line in lines):
        reference_models()  # says at once that they are not here
    missing = {line.name: [module for module in line.needs if find_spec(module) is None] for line in lines}
    for name, modules in missing.items():
        if modules:
            _say(f"{name} is left out: it needs {' and '.join(modules)} (pip install {' '.join(modules)})\n")
    return own + [line for line in lines if not missing[line.name]]


def _measured(lines: list[_Line], options: argparse.Namespace) -> Run:
    _say("warming up: the first compilation in a process takes longer …\n")
    warm_up(options.device)
    rows = [line for line in lines if isinstance(line, Row)]
    with timing.pinned(options.threads):
        rates = roofline.product_rates((row.product_dtype for row in rows), options.device)
        copy_rate = roofline.copy_rate(_COPIED_BYTES, options.device)
    named = {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()}
    result = Run(_machine(options), named, copy_rate, [])
    against = table.chosen(options.against) if options.against is not None else ()
    settings = measure.Settings(options.device, options.threads, options.seconds, against, _say)
    for number, line in enumerate(lines, 1):
        _say(f"[{number}/{len(lines)}] {line.name}: ")
        torch.compiler.reset()
        torch.manual_seed(0)
        try:
            result.results.append(_one(line, rates, settings))
        except CommandError as error:
            if number == len(lines) and not result.results:
                raise
            _say(f"left out: {error}\n")
        if options.json is not None:  # after every row, so that an interrupted run leaves what it has
            results.write(result, options.json)
    return result


def _machine(options: argparse.Namespace) -> dict[str, str]:
    machine = timing.machine(options.device, options.threads)
    return machine if options.note is None else machine | {"note": options.note}


def _one(line: _Line, rates: dict[torch.dtype, float], settings: measure.Settings) -> Result:
    if isinstance(line, Row):
        return measure.compared(line, rates[line.product_dtype], settings)
    return measure.packed(line, settings) if isinstance(line, PackedRow) else measure.priced(line, settings)


def _show(runs: list[Run], options: argparse.Namespace) -> None:
    for row in (row for run in runs for row in run.results):
        if options.model is not None and row.name.startswith(options.model):
            print(_what_was_fused(row))
    print(page.text(runs, options.format))
    if options.plot is not None:
        plot.draw(runs[0], options.plot)
    if options.readme is not None:
        page.rewrite(options.readme, *runs)


def _what_was_fused(result: Result) -> str:
    fused = ", ".join(f"{count} × {name}" for name, count in sorted(result.fused.items())) or "nothing"
    advice = "; `explain` says why" if result.declined else ""
    return f"{result.name}: fused {fused}; declined {result.declined}{advice}\n"


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)
