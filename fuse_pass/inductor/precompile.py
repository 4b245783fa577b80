"""What PyTorch writes down of a compiled function for other processes (`torch._dynamo.config.caching_precompile`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._dynamo import package, symbolic_convert
from torch.fx import GraphModule

__all__ = ["leave_out", "note"]


class _Stamp(package.InlinedSource):
    """What a precompiled function depends on, beside the sources of the user; unpickled only where `load` agrees.

    PyTorch looks functions up by name and line alone, checks the sources that they inline, and starts anew where an
    entry cannot be unpickled.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return self.content  # type: ignore[return-value]


def note(load: Callable[..., None], *arguments: Any) -> None:
    """Lets the function that is compiled now be loaded by another process only if `load(*arguments)` raises nothing.

    Does nothing where PyTorch does not precompile (`torch._dynamo.config.caching_precompile`).
    """
    tracer = getattr(symbolic_convert.tls, "current_tx", None)
    entry = None if tracer is None else tracer.output.package
    if entry is not None:
        stamp = _Stamp("torch", 1, 1, package._hash_source(""), (_checked, (load, arguments)))  # type: ignore[arg-type]
        entry._source_info.inlined_sources.add(stamp)


def _checked(load: Callable[..., None], arguments: tuple[Any, ...]) -> _Stamp:
    load(*arguments)
    return _Stamp("torch", 1, 1, package._hash_source(""), (_checked, (load, arguments)))  # type: ignore[arg-type]


def leave_out(gm: GraphModule) -> None:
    """Another process does not find what becomes of this graph, and compiles it."""
    gm.__dict__.pop("_backend_id", None)
