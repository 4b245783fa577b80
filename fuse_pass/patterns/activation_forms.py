"""Which activation an elementwise computation is: called by name, or written out in any algebraically equal way.

To teach it another way of writing, add a plain function to its row in `numerics.activations`; it is brought into the
normal form of the graph's.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, symbolic_trace

from fuse_pass.graph.canonical import Op, called_activation
from fuse_pass.graph.expression import (
    Expression,
    Polynomial,
    expression_of,
    first_difference,
    reordered,
    same,
    same_structure,
)
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import same_size, value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.report import Reason

# What the root of every way of writing one out is.
_LAST_STEPS = ("mul", "div", "add", "sub", "pow", "square")


@dataclass(frozen=True)
class FoundActivation:
    """An activation in a graph.

    Attributes:
        name: key in `numerics.activations.ACTIVATIONS`.
        arguments: its constants (numbers, or nodes where the graph computes them).
        learned: what is its weight: PReLU's slope, or single numbers that are one tensor yet to be made.
        input: the pre-activation.
        nodes: the nodes that compute it.
        problem: set where it is an activation in all but a constant.
    """

    name: str
    arguments: tuple[Any, ...]
    learned: tuple[Node, ...]
    input: Node
    nodes: tuple[Node, ...]
    problem: Problem | None = None

    @property
    def is_called(self) -> bool:
        """Whether one node computes it."""
        return len(self.nodes) == 1


def activation_at(view: GraphView, node: Node) -> FoundActivation | None:
    """The activation whose value `node` is, or None."""
    return _called(view, node) or _written_out(view, node)


def _called(view: GraphView, node: Node) -> FoundActivation | None:
    op = view.op(node)
    if op is None or not isinstance(op.arguments.get("input"), Node):
        return None
    if op.in_place and not view.owns_its_input(op):
        return None
    row = called_activation(op)
    if row is None:
        return None
    arguments = tuple(op[name] for name in row.constants)
    weight = op.arguments.get("weight")
    learned = () if weight is None else (weight,)
    return FoundActivation(row.name, arguments, learned, op["input"], (node,), _slope_of_another_dimension(op, weight))


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
    expression = expression_of(view, node, functools.partial(_is_learned, view))
    if expression is None:
        return None
    tolerance = _tolerance(expression)
    near: tuple[str, Polynomial] | None = None
    for name, form, order in _forms(len(expression.learned)):
        if same(expression.polynomial, form, tolerance):
            problem = _cast_inside(view, expression) or _promotion_inside(expression)
            learned = tuple(expression.learned[i] for i in order)
            return FoundActivation(name, (), learned, expression.variable, expression.nodes, problem)
        if near is None and not order and same_structure(expression.polynomial, form):
            near = name, form
    if near is None:
        return None
    name, form = near
    difference = first_difference(expression.polynomial, form, tolerance)
    assert difference is not None
    detail = f"{difference[0]:.9g} where {name} has {difference[1]:.9g}"
    return FoundActivation(name, (), (), expression.variable, expression.nodes, Problem(Reason.CONSTANTS, detail, node))


def _is_learned(view: GraphView, node: Node) -> bool:
    """Whether it is a number, which multiplies or shifts a whole activation."""
    value = value_of(node)
    is_number = value is not None and value.dim() <= 1 and value.is_floating_point() and same_size(value.numel(), 1)
    return is_number and node not in view.linears


def _promotion_inside(expression: Expression) -> Problem | None:
    """A number in a wider dtype than that of the variable makes the rest of the computation wider."""
    variable = value_of(expression.variable)
    for node in expression.learned:
        value = value_of(node)
        if variable is None or value is None or value.dtype is not variable.dtype:
            return Problem(Reason.DTYPES, f"{node.name} has another dtype than {expression.variable.name}", node)
    return None


def _cast_inside(view: GraphView, expression: Expression) -> Problem | None:
    for node in expression.nodes:
        op, after = view.op(node), value_of(node)
        if op is not None and op.kind in ("cast", "reshape") and after is not None:
            before = value_of(op["input"])
            if before is None or before.dtype is not after.dtype:
                return Problem(Reason.DTYPES, f"{node.name} casts inside the activation", node)
    return None


@functools.cache
def _forms(count: int) -> tuple[tuple[str, Polynomial, tuple[int, ...]], ...]:
    """The forms with so many learned numbers, each in every order in which a graph may have read these.

    The order says which of the graph's is the first, second, … of the form.
    """
    found = []
    for row in ACTIVATIONS.values():
        for form in row.forms:
            if len(inspect.signature(form).parameters) == 1 + count:
                polynomial = normal_form(form)
                orders = itertools.permutations(range(count))
                found += [(row.name, reordered(polynomial, order), order) for order in orders]
    return tuple(found)


def normal_form(function: Callable[..., Tensor]) -> Polynomial:
    """The normal form of a plain elementwise function of one tensor, and of learned numbers after it."""
    graph = symbolic_trace(function).graph
    result = graph.find_nodes(op="output")[0].args[0]
    numbers = [node for node in graph.nodes if node.op == "placeholder"][1:]
    expression = expression_of(GraphView(graph), result, numbers.__contains__)
    if expression is None:
        raise ValueError(f"expected an elementwise function of one tensor, got {graph}")
    return reordered(expression.polynomial, [numbers.index(node) for node in expression.learned])


def _tolerance(expression: Expression) -> float:
    """Constants written with fewer digits count as equal within a few roundings of the dtype, at most of float32."""
    value = value_of(expression.variable)
    dtype = torch.float32 if value is None or value.dtype is not torch.float64 else torch.float64
    return 4 * torch.finfo(dtype).eps
