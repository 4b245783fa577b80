"""The commands and their arguments, which are read before what a command needs is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Groups of rows that `bench` measures, and the ones that it measures if none is named.
GROUPS: dict[str, tuple[str, ...]] = {
    "ops": ("dropout_norm/*", "dense_act_dense/*"),
    "transformers": ("bert/*", "gpt2/*", "vit/*"),
    "models": ("models/*",),
    "few": ("few/*",),
    "tiny": ("tiny/*",),
    "numbers": ("numbers/*",),
    "packed": ("numbers/packed/*",),
    "served": ("mlp/*", "minilm/*", "vit_1/*", "dense_act_dense/512x768x3072/bf16/infer*"),
    "pass": ("pass/*",),
    "all": ("*",),
}
DEFAULT_ROWS = ("ops", "bert/*", "tiny", "numbers")

_MODELS = (
    "reference models by name, or package.module:function returning (model, args) or (model, args, kwargs); "
    "all reference models if none"
)


@dataclass(frozen=True)
class Command:
    """What `fuse-pass NAME` is.

    Attributes:
        name: the first word after `fuse-pass`.
        help: what it does, in a line.
        add_arguments: adds its arguments to a parser.
        module: the file whose `run` is called with what was parsed.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for the timings (default 1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the timings (default 10)")


def _coverage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=_MODELS)
    parser.add_argument("--details", action="store_true", help="every match and every declined candidate")
    parser.add_argument("--format", default="simple", help="a table format of tabulate, e.g. github")


def _explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=_MODELS)


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help=f"rows by name, by glob ('*/train') or by group: {', '.join(GROUPS)}; "
        f"without any: {' '.join(DEFAULT_ROWS)}, about 10 minutes (all: about 30)",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows that would be measured")
    parser.add_argument(
        "--model",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="a model of your own: a function returning (model, args) or (model, args, kwargs)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, each on a core of its own (default 1)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time to measure each row, or 9 rounds (default 4)")
    parser.add_argument("--format", default="simple", help="a table format of tabulate, e.g. github")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything that was measured")
    parser.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="draw the ratios to torch.compile (needs matplotlib)"
    )
    parser.add_argument(
        "--against",
        metavar="NAME,…",
        help="others for inference on a CPU: onnxruntime, openvino, zentorch, torchao, torch_dynamic, bitsandbytes "
        "(pip install 'fuse_pass[contenders]'); with the error of every result against float64",
    )
    parser.add_argument("--note", help="a remark on the machine, kept with the figures, e.g. 'busy'")
    parser.add_argument(
        "--from",
        metavar="FILE",
        type=Path,
        nargs="+",
        dest="source",
        help="measure nothing; show what --json wrote, several runs side by side",
    )
    parser.add_argument("--readme", metavar="FILE", type=Path, help="put the tables between the markers of a README")


def _probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--renew", action="store_true", help="forget what is known and measure anew (about a second)")


COMMANDS = (
    Command(
        "demo",
        "embed real sentences with a real model: eager, torch.compile and fuse_pass side by side",
        _demo,
        "fuse_pass.commands.demo",
    ),
    Command(
        "coverage",
        "what fuse_pass would fuse in models, without building kernels",
        _coverage,
        "fuse_pass.commands.coverage",
    ),
    Command(
        "explain",
        "the candidates that fuse_pass would leave alone, with reasons and advice",
        _explain,
        "fuse_pass.commands.explain",
    ),
    Command("bench", "time fuse_pass against torch.compile and eager PyTorch", _bench, "fuse_pass.bench.command"),
    Command(
        "probe",
        "which library multiplies matrices faster on this machine, as it was measured",
        _probe,
        "fuse_pass.commands.probe",
    ),
)
