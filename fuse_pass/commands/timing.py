"""Fair timings: contenders alternate in one process, so that a change of the machine's speed hits all of them.

The C allocator is told to keep freed memory. Otherwise whoever comes after a large `free` pays for fresh pages from the
system (measured: 3 ms on a kernel of 0.6 ms), and which contender that is changes from run to run.

On one thread the clock is the CPU time of the process: what other programs do meanwhile does not count, and what a
contender does in threads of its own does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime

import torch

from fuse_pass.gemm.machine import cpu_name, instruction_set

MIN_ROUNDS = 9
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def alternate(
    contenders: Mapping[str, Callable[[], object]], budget: float, rounds: int = MIN_ROUNDS, *, again: bool = False
) -> dict[str, list[float]]:
    """Times every contender in turn, after two warm-ups each.

    Args:
        contenders: calls by name.
        budget: seconds to spend altogether.
        rounds: the fewest, however long they take.
        again: whether a contender is called twice when it is its turn, and the second call timed. Then its weights are
            in the caches as after calls of its own, and not as others left them, however many those are.

    Returns:
        Seconds of every call that was timed.
    """
    _keep_freed_memory()
    for run in contenders.values():
        run()
        run()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(next(iter(samples.values()))) < rounds:
        for name, run in contenders.items():
            if again:
                run()
            samples[name].append(seconds(run))
    return samples


def ratio(samples: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is: the median over rounds, in each of which both ran once."""
    return statistics.median(a / b for a, b in zip(samples[slow], samples[fast], strict=True))


def _keep_freed_memory() -> None:
    """Sets glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD to 1 GiB; nothing happens with another allocator."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def seconds(run: Callable[[], object]) -> float:
    """Of one call; the device is idle before and after."""
    now = clock()
    _wait_for_device()
    start = now()
    run()
    _wait_for_device()
    return now() - start


def clock() -> Callable[[], float]:
    """Seconds of CPU time where PyTorch runs on one thread and on no device, otherwise of a clock on the wall."""
    return time.process_time if torch.get_num_threads() == 1 and not _uses_device() else time.perf_counter


def _uses_device() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _wait_for_device() -> None:
    if _uses_device():
        torch.cuda.synchronize()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs PyTorch on `count` threads; compile inside, since Dynamo compiles anew for another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def pinned(cores: int) -> Iterator[None]:
    """Keeps this process on the first `cores` cores that it may use, where the system lets us say so."""
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def machine(device: str, thread_count: int) -> dict[str, str]:
    """What figures are measured on, by name of the property."""
    where = {"device": torch.cuda.get_device_name()} if device == "cuda" else {"threads": str(thread_count)}
    is_cpu_time = device == "cpu" and thread_count == 1
    return {
        "cpu": cpu_name(),
        "instructions": instruction_set(),
        **where,
        "clock": "CPU time" if is_cpu_time else "wall",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def described(machine: Mapping[str, str]) -> str:
    """The same in a line."""
    count = machine.get("threads")
    where = machine["device"] if count is None else f"{count} thread{'' if count == '1' else 's'}"
    if machine.get("clock", "wall") != "wall":  # runs before 0.1.0 do not say; they had the clock on the wall
        where += f" ({machine['clock']})"
    if "note" in machine:
        where += f", {machine['note']}"
    return (
        f"{machine['cpu']} ({machine['instructions']}), {where}, torch {machine['torch']}, "
        f"Python {machine['python']}, {machine['date']}"
    )
