"""The ways of compiling a model that are compared: with AOTAutograd or Inductor behind, with and without fuse_pass."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule

from fuse_pass.backend import FuseBackend
from fuse_pass.inductor import compat, compiler, debugging, settings
from fuse_pass.report import Report, publish
from fuse_pass.testing import masks

LEVELS = ("aot", "inductor")

Backend = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def stock(level: str, *, least_budget: bool = False) -> Backend:
    """`torch.compile` without fuse_pass.

    Args:
        level: one of `LEVELS`.
        least_budget: whether a memory budget of 0 becomes the least one above it, as it does with fuse_pass.
    """
    inner: Any = debugging.aot_eager if level == "aot" else compiler.inductor_compiler(None, None)

    def compile_graph(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with settings.memory_budget_of_at_least(compat.LEAST_BUDGET if least_budget else 0):
            return _traced(inner, masks.use_in(gm), inputs)

    return compile_graph


def fused(level: str) -> Backend:
    """`torch.compile` with fuse_pass; a failing pass raises.

    Where Inductor fails at the rewritten graph, which is a fault of its own, users get the graph compiled as it was.
    """
    backend = FuseBackend(strict=True)
    if level == "inductor":

        def compile_or_leave(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            try:
                return _traced(backend, gm, inputs)
            except compiler.InductorError:
                return _traced(FuseBackend(), gm, inputs)

        return compile_or_leave

    def compile_graph(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        rewritten, report = backend.rewrite(gm, own_random_numbers=not compiler.draws_stock_random_numbers({}))
        publish(report)
        return _traced(debugging.aot_eager, masks.use_in(rewritten), inputs)

    return compile_graph


def _traced(backend: Callable[..., Callable[..., Any]], gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A function of several steps that is one call in the graph takes our masks too."""
    with masks.in_eager():
        return backend(gm, list(inputs))


@contextlib.contextmanager
def ready_to_compare() -> Iterator[None]:
    """Dropouts that are not fused take our masks too, and nothing is kept in (or taken from) the user's caches."""
    original = FuseBackend.rewrite

    def rewrite(self: FuseBackend, gm: GraphModule, **options: Any) -> tuple[GraphModule, Report]:
        rewritten, report = original(self, gm, **options)
        return masks.use_in(rewritten), report

    with (
        mock.patch.object(FuseBackend, "rewrite", rewrite),
        masks.in_fused(),
        mock.patch.object(torch.compiler.config, "force_disable_caches", True),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", ".*force disabled")
        yield
