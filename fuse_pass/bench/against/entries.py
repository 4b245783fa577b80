"""Who of the contenders takes part in a row: built, called once, and looked at before anything is timed."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fuse_pass.bench.against import accuracy
from fuse_pass.bench.against.contender import Contender, Task
from fuse_pass.commands.errors import CommandError

# Seconds of CPU time over which threads are compared, and the share that may be spent outside the calling one: the
# clocks of a process and of a thread are read one after the other.
_LOOKED_AT, _ELSEWHERE = 0.02, 0.1


@dataclass(frozen=True)
class Entries:
    """By contender.

    Attributes:
        calls: of those who take part.
        errors: relative, of their results against those in float64.
        absent: why the others do not, in a line.
    """

    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def entries(
    contenders: Sequence[Contender], task: Task, truth: Sequence[Tensor], progress: Callable[[str], None]
) -> Entries:
    """Builds every contender; progress gets a word for each."""
    found = Entries()
    for contender in contenders:
        try:
            found.calls[contender.name], found.errors[contender.name] = _entry(contender, task, truth)
        except CommandError as error:
            found.absent[contender.name] = str(error)
        except Exception as error:  # whatever goes wrong in a library that is not ours is the reason
            found.absent[contender.name] = _in_a_line(error)
        reason = found.absent.get(contender.name)
        progress(contender.name if reason is None else f"{contender.name} not ({reason})")
    return found


def nothing_for(kind: str) -> str:
    """Why a contender without such arithmetic does not take part."""
    return f"has nothing for {kind}"


def _in_a_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:160]}"


def _entry(contender: Contender, task: Task, truth: Sequence[Tensor]) -> tuple[Callable[[], Any], float]:
    if task.kind not in contender.build:
        raise CommandError(nothing_for(task.kind))
    with _quiet():
        built = contender.build[task.kind](task)
        error = accuracy.relative_error(built.read(built.call()), truth)
    accuracy.check(error, task)
    if task.threads == 1:
        _check_threads(built.call)
    return built.call, error


def _check_threads(call: Callable[[], Any]) -> None:
    """Holds a contender to the calling thread.

    Raises:
        CommandError: a part is computed by other threads than the calling one.
    """
    call()
    process, thread = time.process_time(), time.thread_time()
    while (spent := time.process_time() - process) < _LOOKED_AT:
        call()
    elsewhere = 1 - (time.thread_time() - thread) / spent
    if elsewhere > _ELSEWHERE:
        raise CommandError(f"computes {elsewhere:.0%} in other threads, although it was told to use one")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters and quantisers print pages. What matters comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)
