"""Inserts fake quantisation where `convert` would: on what enters and leaves the arithmetic of a layer.

    y = output(op(input(x), weight(W), bias(b)))

with the sites of a `QuantSpec`. What is quantised, here and by `convert`:

    operation                                      convert                  here
    Linear, convolutions, embedding, norms         the layer                every call of the function, so the layer too
    attention: products, scores, probabilities     nn.MultiheadAttention    that, and F.scaled_dot_product_attention
                                                                            where results are quantised
    other matrix products, einsum                  not                      every call
    activations, softmax, pooling                  the layer                the layer; a function is left as it is
    dropout                                        where its type is named  not
    FusedDenseGELUDense, FusedDropoutLayerNorm     their parts              their parts
    nn.RNN, nn.LSTM, nn.GRU                        the layer                declined; `fuse_pass.compile` swaps them
    BitLinear, Int8Linear, Bilinear, EmbeddingBag  declined                 declined
    additions, views, written-out arithmetic       not                      not

A layer is a module of exactly the type; what a subclass calls counts as functions. For every layer that both quantise,
outputs and gradients have the same bits. A value that several operations read is quantised once, and a quantised result
is not quantised again where that would not change it: in the gradient of a value with several readers, this adds the
same summands in another order. Random numbers of dropout and of stochastic rounding are drawn in another order, too.

Declines when: a tensor is a subclass; an operation lies inside a functorch transform; a graph is the closed body of a
higher-order op; the arithmetic is one opaque call; an activation writes in place into a value that others read (it
would write into the quantised copy).
"""

from __future__ import annotations

import operator
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import is_plain, memory_of, value_of
from fuse_pass.graph.view import GraphView, barrier
from fuse_pass.inductor import private
from fuse_pass.numerics.rounding import STOCHASTIC
from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.patterns.fake_quantization.inserter import Inserter
from fuse_pass.patterns.fake_quantization.open_attention import (
    open_dot_product,
    open_multi_head,
    problem_of_multi_head,
)
from fuse_pass.patterns.fake_quantization.open_layers import (
    is_layer_call,
    open_layer,
    problem_of_layer,
)
from fuse_pass.patterns.fake_quantization.points import LAYERS, MULTI_HEAD, Point, point_of
from fuse_pass.patterns.pattern import Situation, module_path, source_line
from fuse_pass.report import Decline, Match, Reason, Report

NAME = "fake_quant"


# Layers whose arithmetic is out of reach inside one call.
_OPAQUE = (
    private.NATIVE_MULTI_HEAD_ATTENTION, private.ENCODER_LAYER, torch.lstm, torch.gru, torch.rnn_tanh,
    torch.rnn_relu,
)  # fmt: skip
# Layers with weights that `convert` does not know either.
_WITHOUT_LAYER = (F.bilinear, torch.bilinear, F.embedding_bag, torch.embedding_bag)

_LAYER_KINDS = {point.kind for point in LAYERS.values()}
# A frame in the code of a quantised layer; the two that round their operands themselves are no such layers.
_LAYERS = f"{Path(__file__).resolve().parents[2] / 'quantization' / 'layers'}{os.sep}"
_IN_QUANTIZED_LAYER = re.compile(rf'File "{re.escape(_LAYERS)}(?!bit_linear|int8_linear)')


def insert(graph: Graph, situation: Situation, spec: QuantSpec) -> Report:
    """Quantises every reachable operation of one graph, in place; what is out of reach is declined with a reason."""
    view = GraphView(graph, situation.autocast)
    inserter = Inserter(view, spec)
    report = Report()
    for node in view.nodes:
        if _is_in_quantized_layer(node):
            _forget(inserter, node)
            continue
        point = point_of(node)
        if point is not None:
            parts = [(node, point)]
            problem = _problem(view, node, point, situation, spec)
        elif is_layer_call(node):
            problem = _problem_of_place(view, node, situation, spec) or problem_of_layer(node)
            parts = [] if problem is not None else open_layer(inserter, node)
        else:
            parts, problem = [], _problem_of_opaque(node)
        if problem is not None:
            report.declines.append(_decline(node, problem))
            parts = []
        for part, its_point in parts:
            place = module_path(frozenset((part,)))
            report.matches.append(Match(NAME, its_point.kind, place, source_line(part), part.name))
            _quantize(inserter, part, its_point)
        if not parts:
            _forget(inserter, node)
    return report


def _forget(inserter: Inserter, node: Node) -> None:
    reason = barrier(node)
    if reason is not None:
        inserter.forget(node if reason is Reason.MUTATION else None)


def _is_in_quantized_layer(node: Node) -> bool:
    """Whether a layer that `convert` made has quantised the operation already; such a layer names its `float_type`.

    A layer that is the whole model is in no module stack; its code is in that of the call.
    """
    stack = node.meta.get("nn_module_stack") or {}
    is_inside = any(hasattr(kind, "float_type") for _, kind in stack.values())
    return is_inside or _IN_QUANTIZED_LAYER.search(node.meta.get("stack_trace") or "") is not None


def _problem_of_opaque(node: Node) -> Problem | None:
    if node.op != "call_function":
        return None
    if node.target in _WITHOUT_LAYER:
        return Problem(Reason.NO_QUANTIZED_LAYER, f"{node.name} has no quantised layer", node)
    if node.target not in _OPAQUE:
        return None
    detail = f"{getattr(node.target, '__name__', node.target)} is one call; `fuse_pass.convert` opens it"
    return Problem(Reason.OPAQUE, detail, node)


def _problem_of_place(view: GraphView, node: Node, situation: Situation, spec: QuantSpec) -> Problem | None:
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
    return None


def _problem(view: GraphView, node: Node, point: Point, situation: Situation, spec: QuantSpec) -> Problem | None:
    problem = _problem_of_place(view, node, situation, spec)
    if problem is not None:
        return problem
    if point.kind == MULTI_HEAD:
        return problem_of_multi_head(node)
    if any(value is None or not value.is_floating_point() for value in map(value_of, _results(node))):
        return Problem(Reason.DTYPES, f"{node.name} is no floating-point tensor", node)
    return _problem_of_writing(node, point, spec)


def _problem_of_writing(node: Node, point: Point, spec: QuantSpec) -> Problem | None:
    """An activation in place writes into a quantised copy of its input, which others who read the input do not see."""
    operand, value = _operand(node, 0, "input"), value_of(_operand(node, 0, "input"))
    if point.kind not in _LAYER_KINDS or spec.input is None or operand is None or value is None:
        return None
    if barrier(node) is not Reason.MUTATION:
        return None
    for other in node.graph.nodes:
        if other is node:
            return None
        seen = value_of(other)
        if seen is not None and seen.layout is torch.strided and memory_of(seen) == memory_of(value):
            is_from_outside = other.op in ("placeholder", "get_attr")
            if is_from_outside or any(reader > node for reader in other.users):
                return Problem(Reason.MUTATION, f"{node.name} writes into {other.name}, which others see", node)
    return None


def _results(node: Node) -> list[Node]:
    """The node itself or, of a call that returns indices as well, what reads its first result."""
    if not isinstance(node.meta.get("example_value"), (tuple, list)):
        return [node]
    return [reader for reader in node.users if reader.target is operator.getitem and reader.args[1] == 0]


def _decline(node: Node, problem: Problem) -> Decline:
    return Decline(
        NAME, problem.reason, problem.detail, module_path(frozenset((node,))), source_line(node), problem.node.name
    )


def _quantize(inserter: Inserter, node: Node, point: Point) -> None:
    spec = inserter.spec
    if point.kind == MULTI_HEAD:
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
    _forget(inserter, node)
    if point.kind == "sdpa" and spec.output is not None:
        node = open_dot_product(inserter, node)
    for result in _results(node):
        inserter.quantize_result(result, [site for site in sites if site is not None])


def _operand(node: Node, position: int, keyword: str) -> Node | None:
    operand = node.args[position] if position < len(node.args) else node.kwargs.get(keyword)
    value = value_of(operand)
    return operand if isinstance(operand, Node) and value is not None and value.is_floating_point() else None


def _set_operand(node: Node, position: int, keyword: str, new: Node) -> None:
    if position < len(node.args):
        node.update_arg(position, new)
    else:
        node.update_kwarg(keyword, new)
