"""What the patterns of Linear layers share: what may be wrong with a layer, and its weight as our ops want it."""

from __future__ import annotations

from typing import Any

from fuse_pass.graph.convolution import is_grouped
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.experts import has_experts
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import value_of
from fuse_pass.graph.view import GraphView, Linear
from fuse_pass.report import Reason


def problem_of_groups(view: GraphView, *layers: Linear) -> Problem | None:
    """Many products in one call, for which there is no faster library."""
    for layer in layers:
        if is_grouped(view, layer):
            return Problem(Reason.COST, f"{layer.node.name} is grouped: several small products", layer.node)
        if has_experts(layer):
            return Problem(Reason.COST, f"{layer.node.name} has weights of its own for every expert", layer.node)
    return None


def problem_of_bias(layer: Linear) -> Problem | None:
    """An addition promotes, and stays outside autocast; a Linear does neither."""
    product, bias = value_of(layer.nodes[0]), value_of(layer.bias)
    if len(layer.nodes) > 1 and product is not None and bias is not None and product.dtype is not bias.dtype:
        return Problem(Reason.DTYPES, f"{layer.node.name} adds a bias of {bias.dtype} to {product.dtype}", layer.node)
    return None


def weight_of(editor: Editor, layer: Linear, *, flatten: bool) -> Any:
    """The weight of a layer as `[d_out, d_in]`; that of a 1×1 convolution is flattened."""
    if flatten:
        return editor.call("flatten", layer.weight, 1)
    return editor.call("t", layer.weight) if layer.transposed else layer.weight
