"""How far what is traced now must go: the process that traces it, a compiled package, or any machine with PyTorch."""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Iterator
from contextvars import ContextVar

import torch


class Reach(enum.IntEnum):
    """Where a graph runs that calls something."""

    HERE = 0  # in a process with fuse_pass, on this processor
    PACKAGE = 1  # in what Inductor has compiled, which knows its own ops, but not ours
    ANYWHERE = 2  # aten operations alone, right on every machine


_asked: ContextVar[Reach] = ContextVar("reach", default=Reach.HERE)


def reach() -> Reach:
    """The least reach of what may be called now."""
    if torch.compiler.is_dynamo_compiling():  # which cannot read a context variable, and whose graphs run here
        return Reach.HERE
    asked = _asked.get()
    return Reach.PACKAGE if asked is Reach.HERE and _is_packaging() else asked


@contextlib.contextmanager
def going(far: Reach) -> Iterator[None]:
    """What is traced inside goes that far."""
    token = _asked.set(far)
    try:
        yield
    finally:
        _asked.reset(token)


def _is_packaging() -> bool:
    """Whether Inductor, if it is loaded, compiles ahead of time, for a process without fuse_pass."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    is_packaging: bool = virtualized is not None and hasattr(virtualized, "V") and virtualized.V.aot_compilation
    return is_packaging
