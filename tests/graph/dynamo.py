"""Graphs as Dynamo captures them, for tests that read or write a graph without a pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fuse_pass.graph.view import GraphView


def graph_of(function: Callable[..., Any], *arguments: Any, dynamic: bool = False) -> GraphModule:
    """The one graph that Dynamo captures for a call."""
    found: list[GraphModule] = []

    def keep(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True, dynamic=dynamic)(*arguments)
    (module,) = found
    return module


def view_of(function: Callable[..., Any], *arguments: Any, dynamic: bool = False) -> GraphView:
    return GraphView(graph_of(function, *arguments, dynamic=dynamic).graph)


def result_of(view: GraphView) -> Node:
    """The node of the first output."""
    return view.graph.output_node().all_input_nodes[0]
