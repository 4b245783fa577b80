"""When a group of nodes may be replaced by one: the questions that do not depend on the pattern."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fuse_pass.graph.places import nodes_to_move, place_for, run_in_one_mode
from fuse_pass.graph.shapes import is_plain, value_of
from fuse_pass.graph.unseen_writes import is_seen_by_none_of
from fuse_pass.graph.view import GraphView
from fuse_pass.report import Reason


@dataclass(frozen=True)
class Problem:
    """Why a candidate cannot be replaced: a named reason, the case in a sentence, the node to blame."""

    reason: Reason
    detail: str
    node: Node


def find_problem(
    view: GraphView,
    nodes: Iterable[Node],
    outputs: Sequence[Node],
    inputs: Iterable[Node],
    scalars: Iterable[Node] = (),
) -> Problem | None:
    """The first thing that forbids replacing `nodes` by one operation on `inputs` that yields `outputs`.

    Args:
        view: the graph.
        nodes: every node that would vanish.
        outputs: those of them whose values the replacement provides again.
        inputs: tensors that the replacement reads.
        scalars: numbers that it reads and that the graph computes (p and eps of a dynamic graph).
    """
    group = sorted(nodes, key=view.position.__getitem__)
    tensors = [*inputs]
    return (
        _second_reader(group, outputs)
        or _circular(group, tensors)
        or _crossing(view, group)
        or _functorch(view, group)
        or _tensor_kind(tensors)
        or _tensor_kind_inside(group)
        or _devices([*tensors, *group])
        or _order(view, group, outputs, [*tensors, *scalars])
    )


def written_later(view: GraphView, last: Node, kept: Node | None) -> Problem | None:
    """A write, after the last node of a group, into what its replacement keeps for backward and eager might not."""
    result, value = value_of(last), value_of(kept)
    if result is None or value is None or not result.requires_grad:
        return None
    write = view.last_write(value)
    if write is None or view.position[write] <= view.position[last]:
        return None
    return Problem(Reason.MUTATION, f"{write.name} writes into {kept}, which is kept for backward", write)


def _second_reader(group: list[Node], outputs: Sequence[Node]) -> Problem | None:
    members = set(group)
    for node in group:
        if node in outputs:
            continue
        for user in node.users:
            if user not in members:
                reader = "is an output of the graph" if user.op == "output" else f"is also read by {user.name}"
                return Problem(Reason.SECOND_READER, f"{node.name} {reader}", node)
    return None


def _circular(group: list[Node], tensors: list[Node]) -> Problem | None:
    for node in tensors:
        if node in group:
            return Problem(Reason.SECOND_READER, f"{node.name} is read twice by what would be fused", node)
    return None


def _crossing(view: GraphView, group: list[Node]) -> Problem | None:
    members = set(group)
    in_one_mode: bool | None = None
    for node, reason in view.barriers_between(group[0], group[-1]):
        if node in members:
            continue
        if reason is Reason.MUTATION:
            harmless = is_seen_by_none_of(view, node, members)
        else:  # a region that has closed again does not matter to those outside
            in_one_mode = run_in_one_mode(view, group) if in_one_mode is None else in_one_mode
            harmless = in_one_mode
        if not harmless:
            return Problem(reason, f"{node.name} lies between {group[0].name} and {group[-1].name}", node)
    return None


def _tensor_kind(nodes: list[Node]) -> Problem | None:
    for node in nodes:
        problem = _kind_of(node, value_of(node))
        if problem is not None:
            return problem
    return None


def _tensor_kind_inside(group: list[Node]) -> Problem | None:
    """Inside a match, a node may also yield several tensors (`chunk`, `split`)."""
    for node in group:
        noted = node.meta.get("example_value")
        for value in noted if isinstance(noted, (tuple, list)) else (value_of(node),):
            problem = _kind_of(node, value)
            if problem is not None:
                return problem
    return None


def _kind_of(node: Node, value: Any) -> Problem | None:
    if not isinstance(value, torch.Tensor):
        return Problem(Reason.SUBCLASS, f"{node.name} is not a tensor that Dynamo knows the shape of", node)
    if not is_plain(value):
        return Problem(Reason.SUBCLASS, f"{node.name} is a {type(value).__name__} of layout {value.layout}", node)
    if not value.is_floating_point():
        return Problem(Reason.DTYPES, f"{node.name} is {value.dtype}, expected a floating-point tensor", node)
    return None


def _devices(tensors: list[Node]) -> Problem | None:
    devices = {node: value.device for node in tensors if (value := value_of(node)) is not None}
    first = next(iter(devices.values()), None)
    for node, device in devices.items():
        if device != first:
            return Problem(Reason.DEVICES, f"{node.name} is on {device}, the other tensors are on {first}", node)
    return None


def _functorch(view: GraphView, group: list[Node]) -> Problem | None:
    for node in group:
        if view.is_in_functorch(node):
            return Problem(Reason.FUNCTORCH, f"{node.name} is batched or differentiated by torch.func", node)
    return None


def _order(view: GraphView, group: list[Node], outputs: Sequence[Node], inputs: list[Node]) -> Problem | None:
    """An extra output may be read before the last node of the group; everything must be known by then."""
    members = set(group)
    readers = [user for node in outputs for user in node.users if user not in members]
    if not readers:
        return None
    point = place_for(view, min(readers, key=view.position.__getitem__), group[-1])
    for node in inputs:
        if view.position[node] >= view.position[point] and nodes_to_move(view, node, point, members) is None:
            return Problem(Reason.ORDER, f"{node.name} is computed after an output of the group is already read", node)
    return None
