"""Inserts fake quantisation where `convert` would: on what enters and leaves the arithmetic of a layer.

    y = output(op(input(x), weight(W), bias(b)))

for Linear, convolutions, matrix products, attention, embeddings and normalisations, with the sites of a `QuantSpec`. A
value that several operations read is quantised once, and what is already the quantised result of another operation is
not quantised again (it would not change). Models for which both exist get the same bits from `convert` and from here.

Calls of attention are opened: `nn.MultiheadAttention` always, and `F.scaled_dot_product_attention` where results are
quantised, since scores and probabilities are such.

Declines when: a tensor is a subclass; an operation lies inside a functorch transform; a graph is the closed body of a
higher-order op; the arithmetic is one opaque call, such as that of a recurrent layer (`fuse_pass.compile` swaps those
for Quantized* layers, whose arithmetic is left as it is here).
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import is_plain, value_of
from fuse_pass.graph.view import GraphView, barrier
from fuse_pass.ops.rounding import STOCHASTIC
from fuse_pass.patterns.inserter import Inserter
from fuse_pass.patterns.open_attention import open_dot_product, open_multi_head, problem_of_multi_head
from fuse_pass.patterns.pattern import Situation, module_path, source_line
from fuse_pass.report import Decline, Match, Reason, Report
from fuse_pass.spec import QuantSpec

NAME = "fake_quant"


@dataclass(frozen=True)
class Point:
    """An operation whose operands and result are quantised.

    Attributes:
        kind: its name in the report.
        targets: what it looks like in a Dynamo graph; a string is a tensor method.
        operands: position, keyword and site of each operand.
    """

    kind: str
    targets: tuple[Callable[..., Any] | str, ...]
    operands: tuple[tuple[int, str, str], ...]


def _operands(*sites: str, at: int = 0) -> tuple[tuple[int, str, str], ...]:
    """`input` first, then weight and bias from position `at` on."""
    rest = tuple((at + i, site, site) for i, site in enumerate(sites[1:]))
    return ((0, "input", sites[0]), *rest)


_MULTI_HEAD = "multi-head attention"
_MATRICES = (torch.matmul, torch.mm, torch.bmm, operator.matmul, "matmul", "mm", "bmm", "__matmul__")
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_TRANSPOSED_F = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

POINTS: tuple[Point, ...] = (
    Point("linear", (F.linear,), _operands("input", "weight", "bias", at=1)),
    Point("conv", _CONVOLUTIONS, _operands("input", "weight", "bias", at=1)),
    Point("conv_transpose", (*_TRANSPOSED, *_TRANSPOSED_F), _operands("input", "weight", "bias", at=1)),
    Point("addmm", (torch.addmm, "addmm"), ((0, "input", "bias"), (1, "mat1", "input"), (2, "mat2", "weight"))),
    Point("matmul", _MATRICES, ((0, "input", "input"), (1, "other", "input"))),
    Point(
        "sdpa",
        (F.scaled_dot_product_attention,),
        ((0, "query", "input"), (1, "key", "input"), (2, "value", "input")),
    ),
    Point(_MULTI_HEAD, (F.multi_head_attention_forward,), ()),
    Point("einsum", (torch.einsum, torch.functional.einsum), ((1, "", "input"), (2, "", "input"))),
    Point("embedding", (F.embedding, torch.embedding), ()),
    Point("layer_norm", (F.layer_norm, torch.layer_norm), _operands("input", "weight", "bias", at=2)),
    Point("rms_norm", (F.rms_norm, torch.rms_norm), _operands("input", "weight", at=2)),
    Point("group_norm", (F.group_norm, torch.group_norm), _operands("input", "weight", "bias", at=2)),
    Point("batch_norm", (F.batch_norm,), _operands("input", "weight", "bias", at=3)),
    Point("instance_norm", (F.instance_norm,), _operands("input", "weight", "bias", at=3)),
)
# Layers whose arithmetic is out of reach inside one call.
_OPAQUE = (
    torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd, torch.lstm, torch.gru, torch.rnn_tanh,
    torch.rnn_relu,
)  # fmt: skip


_QUANTIZED_LAYERS = f'File "{Path(__file__).resolve().parents[1] / "nn" / "quantized"}{os.sep}'


@functools.cache
def _by_target() -> dict[Any, Point]:
    return {target: point for point in POINTS for target in point.targets}


def insert(graph: Graph, situation: Situation, spec: QuantSpec) -> Report:
    """Quantises every reachable operation of one graph, in place; what is out of reach is declined with a reason."""
    view = GraphView(graph, situation.autocast)
    inserter = Inserter(view, spec)
    report = Report()
    for node in view.nodes:
        point = None if _is_in_quantized_layer(node) else _point_of(node)
        if point is not None:
            problem = _problem(view, node, point, situation, spec)
            if problem is None:
                place, name = module_path(frozenset((node,))), node.name
                report.matches.append(Match(NAME, point.kind, place, source_line(node), name))
                _quantise(inserter, node, point)
            else:
                report.declines.append(_decline(node, problem))
        elif node.op == "call_function" and node.target in _OPAQUE:
            detail = f"{getattr(node.target, '__name__', node.target)} is one call; `fuse_pass.convert` opens it"
            report.declines.append(_decline(node, Problem(Reason.OPAQUE, detail, node)))
        if barrier(node) is not None:
            inserter.forget()
    return report


def _is_in_quantized_layer(node: Node) -> bool:
    """Whether a layer that `convert` made has quantised the operation already; such a layer names its `float_type`.

    A layer that is the whole model is in no module stack; its code is in that of the call.
    """
    stack = node.meta.get("nn_module_stack") or {}
    is_inside = any(hasattr(kind, "float_type") for _, kind in stack.values())
    return is_inside or _QUANTIZED_LAYERS in (node.meta.get("stack_trace") or "")


def _point_of(node: Node) -> Point | None:
    if node.op not in ("call_function", "call_method"):
        return None
    try:
        return _by_target().get(node.target)
    except TypeError:  # an unhashable callable is nobody's operation
        return None


def _problem(view: GraphView, node: Node, point: Point, situation: Situation, spec: QuantSpec) -> Problem | None:
    if situation.body_of is not None:
        return Problem(Reason.HIGHER_ORDER, f"the body of {situation.body_of} is left alone", node)
    if view.is_in_functorch(node):
        return Problem(Reason.FUNCTORCH, f"{node.name} is batched or differentiated by torch.func", node)
    sites = (spec.input, spec.weight, spec.bias, spec.output)
    if not situation.own_random_numbers and any(site is not None and site.rounding in STOCHASTIC for site in sites):
        return Problem(Reason.FALLBACK_RANDOM, "stochastic rounding needs random numbers of our own", node)
    for part in (node, *node.all_input_nodes):
        value = value_of(part)
        if value is not None and not is_plain(value):
            return Problem(Reason.SUBCLASS, f"{part.name} is a {type(value).__name__} of layout {value.layout}", part)
    if point.kind == _MULTI_HEAD:
        return problem_of_multi_head(node)
    result = value_of(node)
    if result is None or not result.is_floating_point():
        return Problem(Reason.DTYPES, f"{node.name} is no floating-point tensor", node)
    return None


def _decline(node: Node, problem: Problem) -> Decline:
    return Decline(
        NAME, problem.reason, problem.detail, module_path(frozenset((node,))), source_line(node), problem.node.name
    )


def _quantise(inserter: Inserter, node: Node, point: Point) -> None:
    spec = inserter.spec
    if point.kind == _MULTI_HEAD:
        open_multi_head(inserter, node)
        return
    with inserter.editor.before(node):
        for position, keyword, name in point.operands:
            operand = _operand(node, position, keyword)
            if operand is None:
                continue
            is_parameter = isinstance(value_of(operand), nn.Parameter)
            site = getattr(spec, "weight" if name == "input" and is_parameter else name)
            if site is not None:
                _set_operand(node, position, keyword, inserter.once(operand, site))
    sites = [spec.output]
    if point.kind == "embedding" and spec.weight is not None:  # the rows that were looked up
        sites.insert(0, spec.weight.of_rows())
    if point.kind == "sdpa" and spec.output is not None:
        node = open_dot_product(inserter, node)
    inserter.quantise_result(node, [site for site in sites if site is not None])


def _operand(node: Node, position: int, keyword: str) -> Node | None:
    operand = node.args[position] if position < len(node.args) else node.kwargs.get(keyword)
    value = value_of(operand)
    return operand if isinstance(operand, Node) and value is not None and value.is_floating_point() else None


def _set_operand(node: Node, position: int, keyword: str, new: Node) -> None:
    if position < len(node.args):
        node.update_arg(position, new)
    else:
        node.update_kwarg(keyword, new)
