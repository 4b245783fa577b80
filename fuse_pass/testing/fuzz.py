"""Looks for wrong results: `python -m fuse_pass.testing.fuzz --seed N --graphs M [--near-misses] [--processes P]`.

Random models hold a pattern (or something that only looks like one) among distractors. Each is run eager, by
`torch.compile` and by fuse_pass, forward and backward, against float64. What is wrong is printed as a script.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch

from fuse_pass.inductor.settings import no_collection_after_compiling
from fuse_pass.testing import levels
from fuse_pass.testing.compare import Status, Verdict, check
from fuse_pass.testing.generate import generate
from fuse_pass.testing.program import Program, script
from fuse_pass.testing.shrink import shrink


@dataclass
class Summary:
    """What a run found.

    Attributes:
        statuses: programs by verdict.
        fusions: by pattern.
        declines: by reason.
        failures: the wrong ones: seed, program and verdict.
    """

    statuses: Counter[Status] = field(default_factory=Counter)
    fusions: Counter[str] = field(default_factory=Counter)
    declines: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, Program, Verdict]] = field(default_factory=list)

    @property
    def graphs(self) -> int:
        """Programs that eager PyTorch and fuse_pass take, which are those that were compared."""
        return self.statuses.total() - self.statuses[Status.REFUSED] - self.statuses[Status.DECLINED]

    def add(self, seed: int, program: Program, verdict: Verdict) -> None:
        self.statuses[verdict.status] += 1
        self.fusions += verdict.report.counts()
        self.declines += Counter(str(decline.reason) for decline in verdict.report.declines)
        if verdict.status is Status.WRONG:
            self.failures.append((seed, program, verdict))

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.statuses + other.statuses,
            self.fusions + other.fusions,
            self.declines + other.declines,
            sorted(self.failures + other.failures, key=lambda failure: failure[0]),
        )

    def __str__(self) -> str:
        parts = [
            f"{self.graphs} graphs: {len(self.failures)} wrong",
            "fused " + _listed(self.fusions),
            "declined " + _listed(self.declines),
        ]
        known = (Status.REFUSED, Status.DECLINED, Status.AS_STOCK, Status.NOISE)
        others = Counter({str(status): self.statuses[status] for status in known})
        return "; ".join([*parts, f"besides {_listed(+others)}"])


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in counts.most_common()) or "nothing"


def fuzz(
    seed: int,
    graphs: int,
    *,
    programs: Callable[[int], Program] = generate,
    level: str = "aot",
    until: Callable[[Summary], bool] = lambda summary: False,
    step: int = 1,
) -> Summary:
    """Compares programs of consecutive seeds until `graphs` of them ran.

    Args:
        seed: of the first program.
        graphs: number of programs; those that eager PyTorch refuses do not count.
        programs: gives the program of a seed.
        level: what stands behind fuse_pass, one of `levels.LEVELS`.
        until: stops early where it holds.
        step: from one seed to the next.
    """
    summary = Summary()
    with _few_collections():
        for now in _progress(seed, graphs, summary, step):
            program = programs(now)
            summary.add(now, program, check(program.text(), level))
            if until(summary):
                break
    return summary


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """What PyTorch holds for good is not searched for garbage again and again: 8 % of the time."""
    gc.collect()
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    try:
        with no_collection_after_compiling():
            yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def in_processes(processes: int, seed: int, graphs: int, near_misses: bool, level: str) -> Summary:
    """`fuzz` in several processes of one thread each, which take the seeds in turn."""
    shares = [graphs // processes + (i < graphs % processes) for i in range(processes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = [pool.submit(_share, seed + i, share, near_misses, level, processes) for i, share in enumerate(shares)]
        return sum((part.result() for part in parts), Summary())


def _share(seed: int, graphs: int, near_misses: bool, level: str, step: int) -> Summary:
    return fuzz(seed, graphs, programs=functools.partial(generate, near_misses=near_misses), level=level, step=step)


def _progress(seed: int, graphs: int, summary: Summary, step: int) -> Iterator[int]:
    """The seeds, with a line on stderr that tells how far it is; nothing where stderr is no terminal."""
    start, now = time.monotonic(), seed
    while summary.graphs < graphs:
        yield now
        now += step
        if sys.stderr.isatty():
            rate = summary.graphs / (time.monotonic() - start)
            print(f"\r{summary.graphs}/{graphs} graphs, {rate:.1f} per second", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)


def smallest(program: Program, level: str) -> Program:
    """A small program that is still wrong."""
    return shrink(program, lambda candidate: check(candidate.text(), level).status is Status.WRONG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 where a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m fuse_pass.testing.fuzz", description="Looks for models that fuse_pass computes wrongly."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first model; the next ones follow (default 0)")
    parser.add_argument("--graphs", type=int, default=100, help="how many models to compare (default 100)")
    parser.add_argument("--near-misses", action="store_true", help="plant what only looks like a pattern")
    parser.add_argument("--level", choices=levels.LEVELS, default="aot", help="what compiles behind fuse_pass")
    parser.add_argument("--shrink", action="store_true", help="make failing models small before they are printed")
    parser.add_argument("--processes", type=int, default=1, help="how many processes share the models (default 1)")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    run = (
        functools.partial(in_processes, options.processes)
        if options.processes > 1
        else functools.partial(_share, step=1)
    )
    summary = run(options.seed, options.graphs, options.near_misses, options.level)
    seconds = time.monotonic() - start
    for seed, program, verdict in summary.failures:
        small = smallest(program, options.level) if options.shrink else program
        print(f"# seed {seed}: " + str(verdict).replace("\n", "\n# "))
        print(script(small.text(), options.level))
    flags = " near misses" if options.near_misses else ""
    print(f"seeds from {options.seed},{flags} level {options.level}: {summary}; {seconds:.0f} s")
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
