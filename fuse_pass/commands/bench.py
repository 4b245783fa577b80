"""`bench`: fuse_pass against `torch.compile` and eager PyTorch, alternating in one process."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from fuse_pass.backend import fuse_backend
from fuse_pass.commands import timing
from fuse_pass.commands.bench_models import Block, DropoutAddNorm, mlp, step
from fuse_pass.commands.bench_numbers import COSTS, Cost
from fuse_pass.commands.errors import CommandError

NAME, HELP = "bench", "time fuse_pass against torch.compile and eager PyTorch"

_OURS, _STOCK, _EAGER, _BASELINE = "fuse_pass", "torch.compile", "eager", "baseline"


@dataclass(frozen=True)
class Row:
    """One line of the benchmark.

    Attributes:
        name: what is measured.
        build: the module.
        shapes: shapes of its inputs.
        train: forward and backward, or forward alone under `no_grad`.
        dtype: of parameters and inputs.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    train: bool
    dtype: torch.dtype = torch.float32

    @property
    def title(self) -> str:
        sizes = " + ".join("×".join(map(str, shape)) for shape in self.shapes)
        return f"{self.name} [{sizes}] {str(self.dtype).removeprefix('torch.')} {'train' if self.train else 'infer'}"


ROWS = (
    Row("dropout+residual+LayerNorm", lambda: DropoutAddNorm(768, 0.1), ((2048, 768),) * 2, True),
    Row("dropout+residual+LayerNorm", lambda: DropoutAddNorm(768, 0.1), ((2048, 768),) * 2, True, torch.bfloat16),
    Row("residual+LayerNorm", lambda: DropoutAddNorm(768, 0.1), ((2048, 768),) * 2, False),
    Row("Linear-GELU-dropout-Linear", lambda: mlp(768, 3072, 0.1), ((256, 768),), True),
    Row("Linear-GELU-Linear", lambda: mlp(768, 3072, 0.0), ((256, 768),), True),
    Row("Linear-GELU-Linear", lambda: mlp(768, 3072, 0.0), ((256, 768),), False),
    Row("Linear-GELU-Linear", lambda: mlp(768, 3072, 0.0), ((256, 768),), True, torch.bfloat16),
    Row("Linear-GELU-Linear", lambda: mlp(768, 3072, 0.0), ((256, 768),), False, torch.bfloat16),
    Row("transformer block", lambda: Block(384, 12, 0.1), ((4, 128, 384),), True),
    Row("transformer block", lambda: Block(384, 12, 0.1), ((4, 128, 384),), False),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="WORDS", help="rows whose title contains these words")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, each on a core of its own (default 1)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time to measure each row (default 5)")
    parser.add_argument("--format", default="simple", help="a table format of tabulate, e.g. github")
    parser.add_argument("--json", metavar="FILE", help="write all samples to a file")


def run(options: argparse.Namespace) -> None:
    rows = [row for row in ROWS if options.only is None or options.only in row.title]
    costs = [cost for cost in COSTS if cost.is_available and (options.only is None or options.only in cost.title)]
    if not rows and not costs:
        raise CommandError(f"no row has {options.only!r} in its title; the titles are:\n" + _titles())
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if options.threads < 1:
        raise CommandError(f"--threads: expected 1 or more, got {options.threads}")
    device = options.device
    measured = {row.title: _measure(row.title, partial(_contenders, row, device), options) for row in rows}
    cost_samples = {cost.title: _measure(cost.title, partial(_against, cost, device), options) for cost in costs}
    machine = timing.machine(options.device, options.threads)
    if measured:
        print(_table(measured, options.format) + "\n")
    if costs:
        print(_cost_table(costs, cost_samples, options.format) + "\n")
    print(f"Median milliseconds; ratios are medians over rounds. Measured on {machine}.")
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "seconds": measured | cost_samples}, indent=1))


def _measure(
    title: str, build: Callable[[], dict[str, Callable[[], object]]], options: argparse.Namespace
) -> dict[str, list[float]]:
    print(f"{title}: compiling …", file=sys.stderr, flush=True)
    with timing.threads(options.threads):
        torch._dynamo.reset()
        torch.manual_seed(0)
        contenders = build()
        with timing.pinned(options.threads):
            return timing.alternate(contenders, options.seconds)


def _titles() -> str:
    return "\n".join(f"  {row.title}" for row in (*ROWS, *COSTS))


def _contenders(row: Row, device: str) -> dict[str, Callable[[], object]]:
    module = row.build().to(device, row.dtype).train(row.train)
    inputs = [torch.randn(shape, device=device, dtype=row.dtype, requires_grad=row.train) for shape in row.shapes]
    compiled: dict[str, Callable[..., Any]] = {
        _EAGER: copy.deepcopy(module),
        _STOCK: torch.compile(copy.deepcopy(module)),
        _OURS: torch.compile(copy.deepcopy(module), backend=fuse_backend),
    }
    return {name: step(model, inputs, train=row.train) for name, model in compiled.items()}


def _table(measured: dict[str, dict[str, list[float]]], table_format: str) -> str:
    rows = []
    for title, samples in measured.items():
        medians = [f"{statistics.median(samples[name]) * 1e3:.2f}" for name in (_EAGER, _STOCK, _OURS)]
        ratios = [f"{timing.ratio(samples, name, _OURS):.2f}×" for name in (_EAGER, _STOCK)]
        rows.append([title, *medians, *ratios])
    headers = ["row", _EAGER, _STOCK, _OURS, "faster than eager", "faster than torch.compile"]
    return tabulate(rows, headers=headers, tablefmt=table_format, colalign=("left", *("right",) * 5))


def _against(cost: Cost, device: str) -> dict[str, Callable[[], object]]:
    ours, baseline = cost.build(device)
    return {_OURS: ours, _BASELINE: baseline}


def _cost_table(costs: list[Cost], measured: dict[str, dict[str, list[float]]], table_format: str) -> str:
    rows = []
    for cost in costs:
        samples = measured[cost.title]
        medians = [f"{statistics.median(samples[name]) * 1e3:.2f}" for name in (_OURS, _BASELINE)]
        rows.append(
            [cost.title, medians[0], cost.baseline, medians[1], f"{timing.ratio(samples, _OURS, _BASELINE):.2f}×"]
        )
    headers = ["number formats", _OURS, "against", "baseline", "takes"]
    return tabulate(rows, headers=headers, tablefmt=table_format, colalign=("left", "right", "left", "right", "right"))
