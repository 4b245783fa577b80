"""`bench`: fuse_pass against `torch.compile` and eager PyTorch, alternating in one process."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fuse_pass.backend import fuse_backend
from fuse_pass.commands import timing
from fuse_pass.commands.errors import CommandError

NAME, HELP = "bench", "time fuse_pass against torch.compile and eager PyTorch"

_OURS, _STOCK, _EAGER = "fuse_pass", "torch.compile", "eager"


class DropoutAddNorm(nn.Module):
    """`LayerNorm(residual + dropout(x))`."""

    def __init__(self, dim: int, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(residual + self.dropout(x))  # type: ignore[no-any-return]


def _mlp(dim: int, hidden: int, p: float) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(p), nn.Linear(hidden, dim))


class Block(nn.Module):
    """A post-norm transformer block, as in BERT."""

    def __init__(self, dim: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.attention_norm = DropoutAddNorm(dim, p)
        self.mlp = _mlp(dim, 4 * dim, 0.0)
        self.mlp_norm = DropoutAddNorm(dim, p)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.attention_norm(self.project(attended), x)
        return self.mlp_norm(self.mlp(x), x)  # type: ignore[no-any-return]


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
    Row("Linear-GELU-dropout-Linear", lambda: _mlp(768, 3072, 0.1), ((256, 768),), True),
    Row("Linear-GELU-Linear", lambda: _mlp(768, 3072, 0.0), ((256, 768),), True),
    Row("Linear-GELU-Linear", lambda: _mlp(768, 3072, 0.0), ((256, 768),), False),
    Row("Linear-GELU-Linear", lambda: _mlp(768, 3072, 0.0), ((256, 768),), True, torch.bfloat16),
    Row("Linear-GELU-Linear", lambda: _mlp(768, 3072, 0.0), ((256, 768),), False, torch.bfloat16),
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
    if not rows:
        raise CommandError(f"no row has {options.only!r} in its title; the titles are:\n" + _titles())
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if options.threads < 1:
        raise CommandError(f"--threads: expected 1 or more, got {options.threads}")
    measured = {}
    for row in rows:
        print(f"{row.title}: compiling …", file=sys.stderr, flush=True)
        with timing.threads(options.threads):
            contenders = _contenders(row, options.device)
            with timing.pinned(options.threads):
                measured[row.title] = timing.alternate(contenders, options.seconds)
    machine = timing.machine(options.device, options.threads)
    print(_table(measured, options.format))
    print(f"\nMedian milliseconds; ratios are medians over rounds. Measured on {machine}.")
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "seconds": measured}, indent=1))


def _titles() -> str:
    return "\n".join(f"  {row.title}" for row in ROWS)


def _contenders(row: Row, device: str) -> dict[str, Callable[[], object]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = row.build().to(device, row.dtype).train(row.train)
    inputs = [torch.randn(shape, device=device, dtype=row.dtype, requires_grad=row.train) for shape in row.shapes]
    compiled: dict[str, Callable[..., Any]] = {
        _EAGER: copy.deepcopy(module),
        _STOCK: torch.compile(copy.deepcopy(module)),
        _OURS: torch.compile(copy.deepcopy(module), backend=fuse_backend),
    }
    return {name: _step(model, inputs, train=row.train) for name, model in compiled.items()}


def _step(model: Any, inputs: list[Tensor], *, train: bool) -> Callable[[], object]:
    def infer() -> object:
        with torch.no_grad():
            return model(*inputs)

    def step() -> None:
        for tensor in (*inputs, *model.parameters()):
            tensor.grad = None
        y = model(*inputs)
        y.backward(torch.ones_like(y))

    run = step if train else infer
    run()  # compiles
    return run


def _table(measured: dict[str, dict[str, list[float]]], table_format: str) -> str:
    rows = []
    for title, samples in measured.items():
        medians = [f"{statistics.median(samples[name]) * 1e3:.2f}" for name in (_EAGER, _STOCK, _OURS)]
        ratios = [f"{timing.ratio(samples, name, _OURS):.2f}×" for name in (_EAGER, _STOCK)]
        rows.append([title, *medians, *ratios])
    headers = ["row", _EAGER, _STOCK, _OURS, "faster than eager", "faster than torch.compile"]
    return tabulate(rows, headers=headers, tablefmt=table_format, colalign=("left", *("right",) * 5))
