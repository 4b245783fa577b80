"""Writes into memory that the graph has just allocated, as the random numbers of a drop path are drawn.

    mask = x.new_empty(shape).bernoulli_(keep);  mask.div_(keep);  y = x * mask

Such a write is seen by the readers of that memory alone, and so every other operation may be moved across it.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch.fx import Node

from fuse_pass.graph.shapes import value_of
from fuse_pass.graph.view import GraphView

# Written by these methods: nothing but the tensor itself, which is also the result.
_WRITING = ("bernoulli_", "floor_", "div_", "mul_", "add_", "sub_", "uniform_", "normal_", "zero_", "fill_")
_ALLOCATING_METHODS = ("new_empty", "new_zeros", "new_ones", "new_full")
_ALLOCATING = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.empty_like, torch.rand_like)
_ARITHMETIC = ("add", "sub", "mul", "div")


def is_seen_by_none_of(view: GraphView, write: Node, nodes: Set[Node]) -> bool:
    """Whether `write` changes memory that the graph has allocated and that none of `nodes` reads."""
    if not _writes(write):
        return False
    root = write
    while _writes(root):
        root = root.args[0]  # type: ignore[assignment]  # a method is called on a node
    if not _allocates(view, root):
        return False
    aliases = [root]
    for alias in aliases:  # grows while it is read
        for user in alias.users:
            if _writes(user) and user.args[0] is alias:
                aliases.append(user)
            elif user in nodes or not _is_arithmetic(view, user):
                return False
    return True


def _writes(node: Node) -> bool:
    return node.op == "call_method" and node.target in _WRITING and isinstance(node.args[0], Node) and not node.kwargs


def _allocates(view: GraphView, node: Node) -> bool:
    """Whether the value of a node is a tensor of its own."""
    if value_of(node) is None or node.kwargs.get("out") is not None:
        return False
    if node.op == "call_method" and node.target in _ALLOCATING_METHODS:
        return True
    return _is_arithmetic(view, node) or (node.op == "call_function" and node.target in _ALLOCATING)


def _is_arithmetic(view: GraphView, node: Node) -> bool:
    op = view.op(node)
    return op is not None and op.kind in _ARITHMETIC and not op.in_place
