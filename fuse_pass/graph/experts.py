"""Products with one matrix per expert, which are Linear layers to a pattern: `y[e] = x[e] W[e]`, rows by expert.

Grouped (`_grouped_mm`: x `[T, d_in]`, sorted by expert, W `[E, d_in, d_out]`) or batched (`bmm`: x `[E, T, d_in]`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fuse_pass.graph.shapes import value_of
from fuse_pass.graph.view import GraphView, Linear

_BATCHED = (torch.bmm, "bmm", torch.ops.aten.bmm.default)


def expert_layers(view: GraphView) -> dict[Node, Linear]:
    """Every product of rows with a stack of weights, by its node."""
    found = {}
    for node in view.nodes:
        if len(node.args) >= 2 and _multiplies_in_groups(view, node):
            x, weight = node.args[:2]
            value = value_of(weight)
            if isinstance(x, Node) and isinstance(weight, Node) and value is not None and value.dim() == 3:
                found[node] = Linear(node, x, weight, None, True, (node,))
    return found


def _multiplies_in_groups(view: GraphView, node: Node) -> bool:
    if node.op == "call_function" and "grouped_mm" in getattr(node.target, "__name__", ""):
        return True  # also those that libraries register for devices without one
    is_batched = view.kind(node) == "matmul" or (node.op.startswith("call_") and node.target in _BATCHED)
    return is_batched and _is_weight(view, node.args[1])


def _is_weight(view: GraphView, node: Any) -> bool:
    """Attention multiplies stacks of matrices too; those are no parameters."""
    while view.kind(node) in ("transpose", "permute", "getattr", "cast"):
        node = node.args[0]
    return isinstance(value_of(node), nn.Parameter)


def has_experts(layer: Linear) -> bool:
    value = value_of(layer.weight)
    return value is not None and value.dim() == 3 and layer.transposed
