"""Which half of another value a node is, along one dimension: `chunk`, `split`, `narrow` or a slice."""

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
    dim: which is halved, counted from the front.
    nodes: the nodes that take the half.
    """

    source: Node
    index: int
    dim: int
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
    if isinstance(index, tuple) and index:
        return _sliced_once(node, op["input"], index)
    return None


def _part(op: Op, parts: Op) -> Half | None:
    values, index = parts.node.meta.get("example_value"), op["other"]
    dim = _dimension(parts["input"], parts["dim"])
    if not isinstance(values, (tuple, list)) or len(values) != 2 or dim is None or not isinstance(index, int):
        return None
    return Half(parts["input"], index % 2, dim, (parts.node, op.node))


def _sliced_once(node: Node, source: Node, index: tuple[Any, ...]) -> Half | None:
    """`x[..., :n]`, `x[:, n:]`: everything along all dimensions but one."""
    value = value_of(source)
    if value is None or sum(i is Ellipsis for i in index) > 1 or len(index) > value.dim() + (Ellipsis in index):
        return None
    if not all(i is Ellipsis or (isinstance(i, slice) and i.step in (None, 1)) for i in index):
        return None
    place = index.index(Ellipsis) if Ellipsis in index else len(index)
    slices = {**dict(enumerate(index[:place])), **{i - len(index): s for i, s in enumerate(index) if i > place}}
    cuts = [(dim, cut) for dim, cut in slices.items() if cut != slice(None)]
    return _slice(node, source, cuts[0][0], cuts[0][1].start or 0) if len(cuts) == 1 else None


def _slice(node: Node, source: Node, dim: Any, start: Any) -> Half | None:
    whole, part, begin, dim = value_of(source), value_of(node), _number(start), _dimension(source, dim)
    if whole is None or part is None or begin is None or dim is None:
        return None
    width = part.shape[dim]
    if not same_size(2 * width, whole.shape[dim]):
        return None
    if same_size(begin, 0):
        return Half(source, 0, dim, (node,))
    return Half(source, 1, dim, (node,)) if same_size(begin, width) or same_size(begin, -width) else None


def _dimension(source: Node, dim: Any) -> int | None:
    value = value_of(source)
    if value is None or not isinstance(dim, int) or not -value.dim() <= dim < value.dim():
        return None
    return dim % value.dim()


def _number(value: Any) -> Any:
    """A number, or the one that Dynamo knows for a node."""
    return value.meta.get("example_value") if isinstance(value, Node) else value
