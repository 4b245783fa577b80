"""What the patterns of Linear layers share: walking between two of them, and what may be wrong there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from fuse_pass.graph.convolution import CHANNELS, is_grouped
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.experts import has_experts
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import same_shape, value_of
from fuse_pass.graph.view import GraphView, Linear, Walk
from fuse_pass.ops.fake_quantize import FakeQuantize
from fuse_pass.ops.fused_op import declaration_of
from fuse_pass.ops.packed_format import pack
from fuse_pass.report import Reason


def through_quantisation(view: GraphView, walks: list[Walk], nodes: list[Node]) -> list[int]:
    """Walks on past deterministic fake quantisation; returns its settings as the op takes them, or none.

    A layer that quantises its result is often followed by one that quantises its input, behind a view or in another
    format: the settings are those of both then, in order, and of one where the second changes nothing.
    """
    settings: list[int] = []
    last: list[int] = []
    while (found := _settings_of(walks[-1].node)) is not None:
        source, packed = found
        nodes.append(walks[-1].node)
        walks.append(view.walk_up(source))
        nodes += walks[-1].passed
        if packed != last:
            settings, last = [*packed, *settings], packed
    return settings


def _settings_of(node: Node) -> tuple[Node, list[int]] | None:
    """What a fake quantisation that an op can do inside reads, and how it rounds."""
    if declaration_of(node.target) is not FakeQuantize:
        return None
    call = FakeQuantize.of_call(node.args, node.kwargs)
    if call.seed is not None or call.clip_grad or not isinstance(call.x, Node):
        return None
    return call.x, pack(call.how)


def as_arguments(formats: Sequence[list[int]]) -> tuple[list[int], ...]:
    """Settings as the last arguments of an op, without empty ones at the end."""
    count = max((i + 1 for i, settings in enumerate(formats) if settings), default=0)
    return tuple(formats[:count])


def through_dropout(view: GraphView, walks: list[Walk], nodes: list[Node]) -> Any:
    """Walks on past an active dropout; returns its p, or 0 where there is none."""
    node = walks[-1].node
    dropout = view.op(node)
    if dropout is None or dropout.kind != "dropout" or (dropout.in_place and not view.owns_its_input(dropout)):
        return 0.0
    walks.append(view.walk_up(dropout["input"]))
    nodes += [node, *walks[-1].passed]
    return dropout["p"]


def problem_of_walks(walks: list[Walk], features: int) -> Problem | None:
    """Rows of a Linear may be rearranged and put back; pixels of a convolution may not."""
    problem = problem_of_casts(walks)
    if problem is not None:
        return problem
    for walk in walks:
        if features == CHANNELS and walk.passed:
            start, end = value_of(walk.node), value_of(walk.passed[0])
            if start is None or end is None or not same_shape(start.shape, end.shape):
                return Problem(Reason.LAYOUT, f"{walk.passed[0].name} changes the shape", walk.passed[0])
        elif walk.moves_rows is not None:
            return Problem(Reason.LAYOUT, f"{walk.moves_rows.name} changes the last dimension", walk.moves_rows)
    return None


def problem_of_casts(walks: list[Walk]) -> Problem | None:
    for walk in walks:
        if walk.casts:
            return Problem(Reason.DTYPES, f"{walk.casts[0].name} casts between the two Linear layers", walk.casts[0])
    return None


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


def as_linear_weight(editor: Editor, weight: Node | None, transposed: bool, along_channels: bool) -> Node | None:
    if along_channels:
        return editor.call("flatten", weight, 1)
    return editor.call("t", weight) if transposed else weight
