"""The graphs of a module: its own, and the bodies of higher-order ops, with what surrounds each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, GraphModule

from fuse_pass.graph.shapes import value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.inductor import compat, private

# Higher-order ops whose bodies are ordinary graphs, and in which a seed is drawn once and kept for backward.
_CHECKPOINT = "tag_activation_checkpoint"
_OPEN_BODIES = (_CHECKPOINT, "invoke_subgraph", "wrap")

Autocast = tuple[tuple[Any, ...], ...]


def graphs_of(module: GraphModule) -> Iterator[tuple[Graph, str | None, Autocast]]:
    """Every graph of a module, the bodies of higher-order ops first, with what `Situation` tells about a body."""
    yield from _bodies(module, None, ())
    yield module.graph, None, ()


def input_kept_for_backward(module: GraphModule) -> str:
    """The name of an input that PyTorch may keep for backward though the graph writes to it; empty if there is none.

    With a memory budget below 1 its partitioner computes checkpoints again from their inputs, and does not see whether
    these are written to before: backward then raises (torch 2.13; without us at a budget of 0, and with values
    of ours that must be kept at any). So nothing is fused there.
    """
    has_checkpoints = any(str(node.target) == _CHECKPOINT for node in module.graph.nodes)
    if not has_checkpoints or compat.memory_budget() >= 1:
        return ""
    view = GraphView(module.graph)
    for node in module.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        writes = [] if value is None else view.writes_to(value)
        # Of the body of a higher-order op nothing is known: it is taken to write everywhere.
        if any(not isinstance(write.target, private.HigherOrderOperator) for write in writes):
            return str(node.name)
    return ""


def _chooses_what_to_keep(body: Any) -> bool:
    """Whether it is that of a selective checkpoint, whose policy asks op by op and does not know ours."""
    return isinstance(body, GraphModule) and private.has_policy(body)


def _bodies(
    module: GraphModule, blocked_by: str | None, autocast: Autocast
) -> Iterator[tuple[Graph, str | None, Autocast]]:
    view = GraphView(module.graph, autocast)
    callers: dict[str, str | None] = {}
    surroundings: dict[str, Autocast] = {}
    for node in module.graph.nodes:
        if isinstance(node.target, private.HigherOrderOperator):
            name = node.target.name()
            regions = tuple(view.autocast_stack(node))
            for argument in node.all_input_nodes:
                if argument.op == "get_attr":
                    body = str(argument.target)
                    same = surroundings.setdefault(body, regions) == regions
                    is_open = name in _OPEN_BODIES and not _chooses_what_to_keep(getattr(module, body, None))
                    callers[body] = callers.get(body) or (None if is_open and same else name)
    for name, child in module.named_children():
        if isinstance(child, GraphModule):
            reason, regions = blocked_by or callers.get(name), surroundings.get(name, autocast)
            yield from _bodies(child, reason, regions)
            yield child.graph, reason, regions
