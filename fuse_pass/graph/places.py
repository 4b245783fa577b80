"""Where in a graph an operation may be put: under the modes of those that it replaces, and after what it reads.

A region (`with torch.no_grad(): …`) that opens and closes between the members of a group, and holds none of them, is
passed over. What an operation reads too late may be moved before it, if it is little arithmetic with a parameter:

    h = x + y;  z = f(h);  v = w + 1;  norm(h, v)    →    v = w + 1;  h, n = …(x, y, v);  z = f(h)
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch.fx import Node

from fuse_pass.graph.shapes import value_of
from fuse_pass.graph.unseen_writes import is_seen_by_none_of
from fuse_pass.graph.view import GraphView, Modes
from fuse_pass.report import Reason

_MOVED = ("cast", "reshape", "add", "sub", "mul", "div", "neg", "exp")
_MAX_MOVED = 6


def run_in_one_mode(view: GraphView, nodes: Sequence[Node]) -> bool:
    """Whether nodes are called under the same autocast, grad mode and inference mode."""
    modes = [view.modes_at(node) for node in nodes]
    if len({(mode.autocast, mode.inference) for mode in modes}) > 1:
        return False
    first = [node for node, mode in zip(nodes, modes, strict=True) if mode.grad is None]
    grad = {mode.grad for mode in modes if mode.grad is not None}
    if not grad or not any(_requires_grad(node, *node.all_input_nodes) for node in nodes):
        return True
    return len(grad | ({_seen_grad_mode(first)} if first else set())) == 1


def _seen_grad_mode(nodes: Sequence[Node]) -> bool | None:
    """Whether gradients were recorded where nodes were called, as their values tell; None where they do not."""
    if any(_requires_grad(node) for node in nodes):
        return True
    return False if any(_requires_grad(*node.all_input_nodes) for node in nodes) else None


def _requires_grad(*nodes: Node) -> bool:
    return any(value is not None and value.requires_grad for value in map(value_of, nodes))


def place_for(view: GraphView, reader: Node, like: Node) -> Node:
    """The node before which a value for `reader` is computed under the modes of `like`: it, or a switch above it."""
    modes, place = view.modes_at(like), reader
    while not _same_modes(view.modes_at(place), modes):
        place = place.prev
        while not view.is_switch(place):
            place = place.prev
    return place


def _same_modes(a: Modes, b: Modes) -> bool:
    """Before the first switch the grad mode is that of the members that are called there."""
    same_grad = a.grad is b.grad or a.grad is None or b.grad is None
    return (a.autocast, a.inference) == (b.autocast, b.inference) and same_grad


def nodes_to_move(view: GraphView, node: Node, place: Node, group: Set[Node]) -> list[Node] | None:
    """What must be moved, first to last, for a value to be known before `place`; None where it may not be moved."""
    moved: list[Node] = []
    while node.op not in ("placeholder", "get_attr"):
        op = view.op(node)
        late = [source for source in node.all_input_nodes if view.position[source] >= view.position[place]]
        sources = late or [source for source in node.all_input_nodes if source.op in ("placeholder", "get_attr")]
        is_little = op is not None and op.kind in _MOVED and not op.in_place and len(moved) < _MAX_MOVED
        is_part = node in group or not group.isdisjoint(node.all_input_nodes)
        if not is_little or len(sources) != 1 or is_part or view.is_in_functorch(node):
            return None
        moved.insert(0, node)
        if not late:
            break
        node = sources[0]
    return moved if _may_cross(view, place, moved) else None


def _may_cross(view: GraphView, place: Node, moved: list[Node]) -> bool:
    """Whether nothing from `place` on changes what is moved before it."""
    if not moved:
        return True
    nodes = set(moved)
    for node, reason in view.barriers_between(place.prev, moved[-1]):
        if reason is not Reason.MUTATION or not is_seen_by_none_of(view, node, nodes):
            return False
    return True
