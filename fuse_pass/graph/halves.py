"""Which half of the last dimension of another value a node is: `chunk`, `split`, `narrow` or a slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fuse_pass.graph.canonical import Op
from fuse_pass.graph.shapes import same_size, value_of
from fuse_pass.graph.view import GraphView


@dataclass(frozen=True)
class Half:
    """Attributes:
    source: the node that is halved.
    index: 0 for the first half, 1 for the second.
    nodes: the nodes that take the half.
    """

    source: Node
    index: int
    nodes: tuple[Node, ...]


def half_of(view: GraphView, node: Node) -> Half | None:
    """The value that `node` is one half of; parts of another width count too where they are the only two."""
    op = view.op(node)
    if op is None or not isinstance(op.arguments.get("input"), Node):
        return None
    if op.kind == "narrow":
        return _slice(node, op["input"], op["dim"], op["start"])
    if op.kind != "getitem":
        return None
    parts = view.op(op["input"])
    if parts is not None and parts.kind in ("chunk", "split"):
        return _part(op, parts)
    index = op["other"]
    if isinstance(index, tuple) and index and isinstance(index[-1], slice) and _takes_all(index[:-1], op["input"]):
        return _slice(node, op["input"], -1, index[-1].start or 0) if index[-1].step in (None, 1) else None
    return None


def _part(op: Op, parts: Op) -> Half | None:
    values, index = parts.node.meta.get("example_value"), op["other"]
    if not isinstance(values, (tuple, list)) or len(values) != 2 or not _is_last(parts["input"], parts["dim"]):
        return None
    return Half(parts["input"], index % 2, (parts.node, op.node)) if isinstance(index, int) else None


def _slice(node: Node, source: Node, dim: Any, start: Any) -> Half | None:
    whole, part, begin = value_of(source), value_of(node), _number(start)
    if whole is None or part is None or begin is None or not _is_last(source, dim):
        return None
    width = part.shape[-1]
    if not same_size(2 * width, whole.shape[-1]):
        return None
    if same_size(begin, 0):
        return Half(source, 0, (node,))
    return Half(source, 1, (node,)) if same_size(begin, width) or same_size(begin, -width) else None


def _takes_all(index: tuple[Any, ...], source: Any) -> bool:
    value = value_of(source)
    if value is None or not all(i is Ellipsis or (isinstance(i, slice) and i == slice(None)) for i in index):
        return False
    return Ellipsis in index or len(index) == value.dim() - 1


def _is_last(source: Node, dim: Any) -> bool:
    value = value_of(source)
    return value is not None and isinstance(dim, int) and dim in (-1, value.dim() - 1)


def _number(value: Any) -> Any:
    """A number, or the one that Dynamo knows for a node."""
    return value.meta.get("example_value") if isinstance(value, Node) else value
