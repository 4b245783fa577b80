"""Calls that return the tensor that they are given, and reads that nobody uses: taken out before anything is matched.

    x.to("cpu"),  x.to(x.dtype),  x.float(),  x.contiguous()        where x is that already

Eager returns x itself there, so that readers of the one may read the other; Keras puts such a call before every layer.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from fuse_pass.graph.canonical import canonical
from fuse_pass.graph.shapes import is_plain, memory_of, same_shape, value_of

_CONTIGUOUS = ("contiguous", "torch.ops.aten.contiguous.default")


def forget_identities(graph: Graph) -> None:
    """Takes them out of a graph; what the graph returns stays as it is."""
    for node in graph.nodes:
        source = _returned_as_it_is(node)
        if source is not None and not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(source)
        op = canonical(node) if not node.users else None
        if (source is not None and not node.users) or (op is not None and op.kind == "getattr"):
            graph.erase_node(node)


def _returned_as_it_is(node: Node) -> Node | None:
    """What a node returns unchanged; None where it computes anything."""
    op = canonical(node)
    if op is None or not (op.kind == "cast" or (op.kind == "reshape" and str(node.target) in _CONTIGUOUS)):
        return None
    before, after = value_of(op["input"]), value_of(node)
    if before is None or after is None or not (is_plain(before) and is_plain(after)):
        return None
    same_kind = (before.dtype, before.device, before.requires_grad) == (after.dtype, after.device, after.requires_grad)
    same_place = same_shape(before.shape, after.shape) and same_shape(before.stride(), after.stride())
    source: Node = op["input"]
    return source if same_kind and same_place and memory_of(before) == memory_of(after) else None
