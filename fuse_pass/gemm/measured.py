"""What is known of the libraries of this machine: the answers to `probe.QUESTIONS`, kept in a file per machine.

A question without an answer, because its rounds did not agree, is asked again in the next process. An answer is not
believed for ever: each process looks for a few milliseconds whether it still holds, and asks all questions anew if one
clearly does not, so that what was found while the machine was busy does not stay.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from fuse_pass.gemm import onednn, probe
from fuse_pass.gemm.machine import instruction_set, processor
from fuse_pass.gemm.probe import QUESTIONS, Kind, Question
from fuse_pass.inductor import compat

# Another number where the probe asks something else, so that verdicts of before are not found.
_VERSION = 4

# By the names of questions: from how many operations on oneDNN is faster, None where it never is.
_Answers = dict[str, int | None]


@functools.cache
def table() -> dict[str, int]:
    """From how many operations on oneDNN is faster, by the name of a question; without an entry it is never chosen.

    For this machine, torch version and thread count; from the cache file if there is one.
    """
    if compat.onednn_linear() is None:
        return {}
    machine, path = _machine(), cache_file()  # as the next process finds them: the probe may see a product fail
    known = _read(path, machine)
    answers = _renewed(known)
    if answers != known:
        _write(path, {"machine": machine, "break_even_flop": answers})
    return {name: flop for name, flop in answers.items() if flop is not None}


def name(dtype: torch.dtype, kind: Kind = Kind.PLAIN) -> str:
    """The name of a question in `table`."""
    return Question(dtype, kind).name


def forget() -> None:
    """Asks all questions anew, here and in later processes."""
    cache_file().unlink(missing_ok=True)
    table.cache_clear()


def _renewed(known: Mapping[str, int | None]) -> _Answers:
    answers = dict(known)
    looked_at = [question for question in QUESTIONS if _is_looked_at(question, known)]
    if any(_is_contradicted(question, known[question.name]) for question in looked_at):
        answers = {}
    for question in QUESTIONS:
        if question.name not in answers:
            answers |= _answer(question)
    return answers


def _is_looked_at(question: Question, known: Mapping[str, int | None]) -> bool:
    """The plain products, and what was found to pay beside them."""
    return question.name in known and (question.kind is Kind.PLAIN or known[question.name] is not None)


def _is_contradicted(question: Question, break_even: int | None) -> bool:
    try:
        return probe.contradicts(question, break_even)
    except onednn.NoPrimitiveError:
        return break_even is not None


def _answer(question: Question) -> _Answers:
    """The answer to one question by its name; nothing where rounds clearly disagree."""
    try:
        rounds = probe.ask(question)
    except onednn.NoPrimitiveError:
        return {question.name: None}
    found = [one.break_even for one in rounds if one.break_even is not None]
    if len(found) == len(rounds):
        return {question.name: max(found)}
    return {question.name: None} if not found or probe.is_tie(question, rounds) else {}


def _read(path: Path, machine: str) -> _Answers:
    """The answers in a file that this machine has written; none from any other file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):  # absent, unreadable, no JSON, or nested too deeply for the parser
        return {}
    if not isinstance(content, dict) or content.get("machine") != machine:
        return {}
    found = content.get("break_even_flop")
    if isinstance(found, dict) and all(_is_entry(name, flop) for name, flop in found.items()):
        return found
    return {}


def _is_entry(name: str, flop: object) -> bool:
    """Whether a question has this name, and may have this answer: a bool, too, is an int."""
    is_answer = flop is None or (type(flop) is int and flop >= probe.MIN_FLOP)
    return is_answer and any(name == question.name for question in QUESTIONS)


def _machine() -> str:
    """All that a verdict depends on. Hypervisors give one name to processors with and without bfloat16 arithmetic."""
    return "; ".join(
        (
            processor(),
            f"PyTorch uses {instruction_set()}",
            onednn.abilities(),
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, probe {_VERSION}",
        )
    )


def cache_file() -> Path:
    """Where the answers of this machine are kept."""
    digest = hashlib.sha256(_machine().encode()).hexdigest()[:16]
    return Path(compat.cache_dir()) / "fuse_pass" / f"gemm-{digest}.json"


def _write(path: Path, content: object) -> None:
    """Atomic, so that a second process never reads half a file. A read-only cache costs the next process a probe."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
