"""Which activation an elementwise computation is: called by name, or written out in any algebraically equal way.

To teach it another way of writing, add a plain function to `FORMS`; it is brought into the normal form of the graph's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node, symbolic_trace

from fuse_pass.graph.canonical import Op
from fuse_pass.graph.expression import (
    Expression,
    Polynomial,
    expression_of,
    first_difference,
    same,
    same_structure,
)
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import same_size, value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.report import Reason

FORMS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "gelu": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),),
    "gelu_tanh": (lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),),
    "quick_gelu": (
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: x / (1 + torch.exp(-1.702 * x)),
    ),
    "silu": (
        lambda x: x * torch.sigmoid(x),
        lambda x: x / (1 + torch.exp(-x)),
    ),
    "mish": (
        lambda x: x * torch.tanh(F.softplus(x)),
        lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
        lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))),
    ),
    "relu_squared": (lambda x: F.relu(x) ** 2,),
    "hardswish_of_relu6": (lambda x: x * F.relu6(x + 3) / 6,),
    "hardsigmoid_of_relu6": (lambda x: F.relu6(x + 3) / 6,),
}

# Activations that the graph calls by name: canonical kind → the constants that go with it.
_CALLED: dict[str, tuple[str, ...]] = {
    "relu": (),
    "leaky_relu": ("negative_slope",),
    "prelu": (),
    "elu": ("alpha",),
    "selu": (),
    "silu": (),
    "mish": (),
    "hardtanh": ("min_val", "max_val"),
    "hardswish": (),
    "hardsigmoid": (),
    "sigmoid": (),
    "tanh": (),
    "softplus": ("beta", "threshold"),
}
# What the root of every way of writing one out is.
_LAST_STEPS = ("mul", "div", "add", "sub", "pow", "square")


@dataclass(frozen=True)
class FoundActivation:
    """An activation in a graph.

    Attributes:
        name: key in `ops.activations.ACTIVATIONS`.
        arguments: its constants (numbers, or nodes where the graph computes them).
        weight: PReLU's slope.
        input: the pre-activation.
        nodes: the nodes that compute it.
        problem: set where it is an activation in all but a constant.
    """

    name: str
    arguments: tuple[Any, ...]
    weight: Node | None
    input: Node
    nodes: tuple[Node, ...]
    problem: Problem | None = None


def activation_at(view: GraphView, node: Node) -> FoundActivation | None:
    """The activation whose value `node` is, or None."""
    return _called(view, node) or _written_out(view, node)


def _called(view: GraphView, node: Node) -> FoundActivation | None:
    op = view.op(node)
    if op is None or not isinstance(op.arguments.get("input"), Node):
        return None
    if op.in_place and not view.owns_its_input(op):
        return None
    if op.kind == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(op["approximate"])
        return None if name is None else FoundActivation(name, (), None, op["input"], (node,))
    if op.kind not in _CALLED:
        return None
    arguments = tuple(op[name] for name in _CALLED[op.kind])
    weight = op["weight"] if op.kind == "prelu" else None
    return FoundActivation(op.kind, arguments, weight, op["input"], (node,), _slope_of_another_dimension(op, weight))


def _slope_of_another_dimension(op: Op, weight: Node | None) -> Problem | None:
    """PReLU's slope per channel belongs to dimension 1, which must be the last."""
    slope, value = value_of(weight), value_of(op["input"])
    if slope is None or same_size(slope.numel(), 1) or (value is not None and value.dim() == 2):
        return None
    assert weight is not None
    return Problem(Reason.LAYOUT, f"the slopes {weight.name} belong to dimension 1, not to the last", weight)


def _written_out(view: GraphView, node: Node) -> FoundActivation | None:
    if view.kind(node) not in _LAST_STEPS:
        return None
    expression = expression_of(view, node)
    if expression is None:
        return None
    tolerance = _tolerance(expression)
    near: tuple[str, Polynomial] | None = None
    for name, form in _forms():
        if same(expression.polynomial, form, tolerance):
            problem = _cast_inside(view, expression)
            return FoundActivation(name, (), None, expression.variable, expression.nodes, problem)
        if near is None and same_structure(expression.polynomial, form):
            near = name, form
    if near is None:
        return None
    name, form = near
    difference = first_difference(expression.polynomial, form, tolerance)
    assert difference is not None
    detail = f"{difference[0]:.9g} where {name} has {difference[1]:.9g}"
    return FoundActivation(
        name, (), None, expression.variable, expression.nodes, Problem(Reason.CONSTANTS, detail, node)
    )


def _cast_inside(view: GraphView, expression: Expression) -> Problem | None:
    for node in expression.nodes:
        op, after = view.op(node), value_of(node)
        if op is not None and op.kind in ("cast", "reshape") and after is not None:
            before = value_of(op["input"])
            if before is None or before.dtype is not after.dtype:
                return Problem(Reason.DTYPES, f"{node.name} casts inside the activation", node)
    return None


@functools.cache
def _forms() -> tuple[tuple[str, Polynomial], ...]:
    return tuple((name, normal_form(function)) for name, functions in FORMS.items() for function in functions)


def normal_form(function: Callable[[Tensor], Tensor]) -> Polynomial:
    """The normal form of a plain elementwise function of one tensor."""
    graph = symbolic_trace(function).graph
    result = graph.find_nodes(op="output")[0].args[0]
    expression = expression_of(GraphView(graph), result)
    if expression is None:
        raise ValueError(f"expected an elementwise function of one tensor, got {graph}")
    return expression.polynomial


def _tolerance(expression: Expression) -> float:
    """Constants written with fewer digits count as equal within a few roundings of the dtype, at most of float32."""
    value = value_of(expression.variable)
    dtype = torch.float32 if value is None or value.dtype is not torch.float64 else torch.float64
    return 4 * torch.finfo(dtype).eps
