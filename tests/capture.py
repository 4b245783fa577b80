"""Rewrites what Dynamo captures and runs the rewritten graphs eagerly: the pass without Inductor, in milliseconds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fuse_pass.backend import FuseBackend
from fuse_pass.gemm.problem import GemmProblem
from fuse_pass.gemm.product import pays
from fuse_pass.report import Report

CostModel = Callable[[GemmProblem], bool]
_cost_model: ContextVar[CostModel] = ContextVar("cost_model", default=pays)


def everything_pays(problem: GemmProblem) -> bool:
    return True


def nothing_pays(problem: GemmProblem) -> bool:
    return False


@contextlib.contextmanager
def costs(cost_model: CostModel) -> Iterator[None]:
    """Which products are worth replacing in what is captured inside, instead of what this machine has measured."""
    token = _cost_model.set(cost_model)
    try:
        yield
    finally:
        _cost_model.reset(token)


@dataclass
class Captured:
    """What came of one call.

    Attributes:
        output: the result of the rewritten graphs, run eagerly, with gradients.
        report: the merged report.
        originals: the graphs as Dynamo gave them.
        rewritten: the same graphs after the pass (the same objects where nothing matched).
    """

    output: Any = None
    report: Report = field(default_factory=Report)
    originals: list[GraphModule] = field(default_factory=list)
    rewritten: list[GraphModule] = field(default_factory=list)

    def calls(self, op_name: str) -> list[Node]:
        """The calls of `fuse_pass::op_name` in the rewritten graphs, sub-graphs included."""
        op = getattr(torch.ops.fuse_pass, op_name).default
        modules = [module for gm in self.rewritten for module in gm.modules() if isinstance(module, GraphModule)]
        return [node for module in modules for node in module.graph.nodes if node.target is op]


def capture(
    function: Callable[..., Any],
    *args: Any,
    backend: FuseBackend | None = None,
    own_random_numbers: bool = True,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **kwargs: Any,
) -> Captured:
    """Compiles `function` (or a module) with a backend that only rewrites, and calls it once. Failures raise."""
    found = Captured()
    cost_model = _cost_model.get()
    chosen = backend or FuseBackend(strict=True)

    def rewrite_only(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        fused, report = chosen.rewrite(gm, own_random_numbers=own_random_numbers, pays=cost_model)
        found.originals.append(gm)
        found.rewritten.append(fused)
        found.report.extend(report)
        return fused.forward

    torch._dynamo.reset()
    found.output = torch.compile(function, backend=rewrite_only, dynamic=dynamic, fullgraph=fullgraph)(*args, **kwargs)
    return found
