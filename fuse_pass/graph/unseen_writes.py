"""Writes that a group of nodes does not see, so that each of its operations may be moved across them.

They go into tensors that share no memory with anything that the group reads or yields: the mask of a drop path, which
the graph has just allocated, a running average, the vectors of a spectral norm.

    mask = x.new_empty(shape).bernoulli_(keep);  mask.div_(keep);  y = x * mask
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fuse_pass.graph.shapes import is_plain, memory_of
from fuse_pass.graph.view import GraphView

# Written by these methods: nothing but the tensor itself, which is also the result.
_METHODS = (
    *("bernoulli_", "uniform_", "normal_", "zero_", "fill_", "copy_", "lerp_", "addcmul_", "addcdiv_"),
    *("add_", "sub_", "mul_", "div_", "sqrt_", "floor_", "clamp_", "clamp_min_", "clamp_max_"),
)
_WITH_OUT = (F.normalize, torch.div, torch.mul, torch.add)


def is_seen_by_none_of(view: GraphView, write: Node, nodes: Set[Node]) -> bool:
    """Whether `write` is known to change nothing that `nodes` read or yield."""
    written = _memory_of(_written_by(view, write))
    if not written:
        return False
    touched = _memory_of([*nodes, *(source for node in nodes for source in node.all_input_nodes)])
    return touched is not None and not written & touched


def _written_by(view: GraphView, node: Node) -> Sequence[Any]:
    """The tensors that a node writes into; none where that is not known for sure."""
    op = view.op(node)
    if op is not None and op.in_place:
        return [op["input"]]
    if node.op == "call_method" and node.target in _METHODS:
        return [node.args[0]]
    if node.op == "call_function" and node.target in _WITH_OUT:
        return [node.kwargs["out"]] if node.kwargs.get("out") is not None else []
    if node.target is F.batch_norm and not {"running_mean", "running_var"} & node.kwargs.keys():
        return [statistic for statistic in node.args[1:3] if statistic is not None]
    return []


def _memory_of(nodes: Iterable[Any]) -> set[int] | None:
    """What the values of nodes share with others; None where one has no memory that could be told."""
    found: set[int] = set()
    for node in nodes:
        noted = node.meta.get("example_value") if isinstance(node, Node) else None
        for value in noted if isinstance(noted, (tuple, list)) else (noted,):
            if isinstance(value, torch.Tensor):
                if not is_plain(value):
                    return None
                found.add(memory_of(value))
    return found
