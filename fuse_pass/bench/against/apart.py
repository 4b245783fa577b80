"""A contender in a process of its own, alternating with eager PyTorch there.

For those that change PyTorch when they are imported. How it compares with us follows through eager, which is measured
in both processes.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from fuse_pass.bench.against import accuracy
from fuse_pass.bench.against.contender import Task, under_no_grad
from fuse_pass.bench.against.entries import entries
from fuse_pass.bench.against.table import CONTENDERS
from fuse_pass.bench.against.tasks import task_of
from fuse_pass.bench.results import EAGER
from fuse_pass.commands import timing
from fuse_pass.commands.errors import CommandError

_LONGEST = 900.0


@dataclass(frozen=True)
class Apart:
    """What the other process measured.

    Attributes:
        samples: seconds of the contender and of eager, by name.
        error: relative, of the contender against float64.
    """

    samples: dict[str, list[float]]
    error: float


def measured_apart(name: str, row: str, threads: int, seconds: float, seed: int = 0) -> Apart:
    """Measures a contender, by name, on a row, by name, in a new process.

    Raises:
        CommandError: it does not take part, with the reason, or the process ended otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:  # libraries print what they like
        answer = Path(folder, "answer.json")
        words = [name, row, str(threads), str(seconds), str(seed), str(answer)]
        command = [sys.executable, "-m", "fuse_pass.bench.against.apart", *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LONGEST)
        except subprocess.TimeoutExpired as error:
            raise CommandError(f"was not done after {_LONGEST:.0f} s in a process of its own") from error
        if done.returncode != 0 or not answer.exists():
            last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise CommandError(f"its process ended with {done.returncode}, saying {last[:160]}")
        content = json.loads(answer.read_text())
    if "absent" in content:
        raise CommandError(content["absent"])
    return Apart(content["samples"], content["error"])


def _measure(name: str, row: str, threads: int, seconds: float, seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    with timing.threads(threads):
        task: Task = task_of(row, threads)
        contender = dataclasses.replace(next(one for one in CONTENDERS if one.name == name), is_apart=False)
        eager = under_no_grad(task.example.model, task.example)
        found = entries([contender], task, accuracy.in_float64(task), lambda word: None)
        if name in found.absent:
            return {"absent": found.absent[name]}
        with timing.pinned(threads):
            samples = timing.alternate({EAGER: eager, **found.calls}, seconds, again=True)
    return {"samples": samples, "error": found.errors[name]}


if __name__ == "__main__":
    own, wanted_row, count, budget, start, target = sys.argv[1:]
    Path(target).write_text(json.dumps(_measure(own, wanted_row, int(count), float(budget), int(start))))
