"""Elementwise arithmetic in a normal form, so that one entry finds every way of writing a function.

An expression in one variable becomes a polynomial over *atoms* (the variable and unary functions of polynomials):
`0.5 * x * (1 + erf(x / sqrt(2)))` and `x * (erf(0.7071 * x) + 1) / 2` are both `0.5·x + 0.5·x·erf(0.7071·x)`. Products
are expanded, like terms collected, odd functions freed of signs; what remains is compared up to the rounding of
constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fuse_pass.graph.canonical import Op, called_activation
from fuse_pass.graph.view import GraphView, is_active_dropout
from fuse_pass.numerics.activations import ACTIVATIONS

# An atom is (function name, its constants, its argument); the variable is ("x", (), ()).
Atom = tuple[str, tuple[float, ...], "Polynomial"]
# Product of powers of atoms.
Monomial = tuple[tuple[Atom, int], ...]
# Sum of (monomial, coefficient), sorted.
Polynomial = tuple[tuple[Monomial, float], ...]

VARIABLE: Polynomial = (((((("x", (), ())), 1),), 1.0),)

MAX_NODES = 24
MAX_TERMS = 16
_ODD = {"tanh", "erf"}


class NotElementwise(Exception):  # noqa: N818 - an outcome, not an error
    """The value is not an expression in one variable, or too large to be an activation."""


def constant(value: float) -> Polynomial:
    return (((), float(value)),) if value else ()


def as_constant(p: Polynomial) -> float | None:
    if not p:
        return 0.0
    return p[0][1] if len(p) == 1 and p[0][0] == () else None


def _collect(terms: dict[Monomial, float]) -> Polynomial:
    if len(terms) > MAX_TERMS:
        raise NotElementwise
    return tuple(sorted((m, c) for m, c in terms.items() if c != 0.0))


def add(a: Polynomial, b: Polynomial, scale: float = 1.0) -> Polynomial:
    terms = dict(a)
    for monomial, coefficient in b:
        terms[monomial] = terms.get(monomial, 0.0) + scale * coefficient
    return _collect(terms)


def multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    terms: dict[Monomial, float] = {}
    for m1, c1 in a:
        for m2, c2 in b:
            powers = dict(m1)
            for atom, exponent in m2:
                powers[atom] = powers.get(atom, 0) + exponent
            monomial = tuple(sorted((atom, e) for atom, e in powers.items() if e))
            terms[monomial] = terms.get(monomial, 0.0) + c1 * c2
    return _collect(terms)


def power(base: Polynomial, exponent: int) -> Polynomial:
    result = constant(1.0)
    for _ in range(abs(exponent)):
        result = multiply(result, base)
    return result if exponent >= 0 else apply("reciprocal", result)


def apply(function: str, argument: Polynomial, *parameters: float) -> Polynomial:
    """`function(argument)`; constants are folded and signs moved out of odd functions."""
    value = as_constant(argument)
    if value is not None and function in _FOLD:
        try:
            return constant(_FOLD[function](value))
        except (ValueError, OverflowError, ZeroDivisionError):
            raise NotElementwise from None
    sign = 1.0
    if function in _ODD and argument and argument[0][1] < 0:
        sign, argument = -1.0, tuple((m, -c) for m, c in argument)
    return (((((function, parameters, argument), 1),), sign),)


_FOLD: dict[str, Callable[[float], float]] = {
    "tanh": math.tanh, "erf": math.erf, "exp": math.exp, "log": math.log, "log1p": math.log1p,
    "sqrt": math.sqrt, "reciprocal": lambda x: 1 / x,
}  # fmt: skip


@dataclass(frozen=True)
class Expression:
    """The value of a node as a function of one other node.

    Attributes:
        polynomial: normal form.
        variable: the node it is a function of.
        nodes: every node of the computation, without the variable.
        learned: further nodes that it is a function of, single numbers; `learned(i)` stands for the i-th.
    """

    polynomial: Polynomial
    variable: Node
    nodes: tuple[Node, ...]
    learned: tuple[Node, ...] = ()


def learned(position: int) -> Polynomial:
    """A number that is known at run time."""
    return ((((_learned_atom(position), 1),), 1.0),)


def _learned_atom(position: int) -> Atom:
    return f"learned {position}", (), ()


def reordered(polynomial: Polynomial, order: Sequence[int]) -> Polynomial:
    """The same with `learned(order[i])` in the place of `learned(i)`, where these are factors of terms."""
    new = {_learned_atom(i): _learned_atom(j) for i, j in enumerate(order)}
    return tuple(
        sorted((tuple(sorted((new.get(atom, atom), e) for atom, e in monomial)), c) for monomial, c in polynomial)
    )


def expression_of(
    view: GraphView, root: Node, is_learned: Callable[[Node], bool] = lambda node: False
) -> Expression | None:
    """Reads the elementwise computation that ends in `root`; None if it depends on several tensors or is too large.

    Args:
        view: the graph.
        root: the result.
        is_learned: which of the nodes that it depends on are single numbers, to be kept apart from the variable.
    """
    reader = _Reader(view, is_learned)
    try:
        polynomial = reader.read(root)
    except NotElementwise:
        return None
    if reader.variable is None or reader.variable is root:
        return None
    return Expression(polynomial, reader.variable, tuple(reader.values), tuple(reader.learned))


class _Reader:
    def __init__(self, view: GraphView, is_learned: Callable[[Node], bool]) -> None:
        self.view = view
        self.is_learned = is_learned
        self.variable: Node | None = None
        self.learned: list[Node] = []
        self.values: dict[Node, Polynomial] = {}
        self.entered = 0

    def read(self, value: Any) -> Polynomial:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return constant(value)
        if not isinstance(value, Node):
            raise NotElementwise
        if value in self.values:
            return self.values[value]
        op = self.view.op(value)
        rule = _RULES.get(op.kind) if op is not None else None
        if op is None or rule is None or value in self.view.linears or (op.kind == "dropout" and is_active_dropout(op)):
            return self._leaf(value)
        self.entered += 1  # on the way down, so that a long chain cannot exhaust the stack
        if self.entered > MAX_NODES or (op.in_place and not self.view.owns_its_input(op)):
            raise NotElementwise
        result = rule(self, op)
        self.values[value] = result
        return result

    def _leaf(self, node: Node) -> Polynomial:
        if self.is_learned(node):
            if node not in self.learned:
                self.learned.append(node)
            return learned(self.learned.index(node))
        if self.variable is None:
            self.variable = node
        if node is not self.variable:
            raise NotElementwise
        return VARIABLE


def _number(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise NotElementwise


def _read_add(reader: _Reader, op: Op) -> Polynomial:
    return add(reader.read(op["input"]), reader.read(op["other"]), _number(op["alpha"]))


def _read_sub(reader: _Reader, op: Op) -> Polynomial:
    return add(reader.read(op["input"]), reader.read(op["other"]), -_number(op["alpha"]))


def _read_div(reader: _Reader, op: Op) -> Polynomial:
    if op["rounding_mode"] is not None:
        raise NotElementwise
    return multiply(reader.read(op["input"]), apply("reciprocal", reader.read(op["other"])))


def _read_pow(reader: _Reader, op: Op) -> Polynomial:
    exponent = _number(op["exponent"])
    if not exponent.is_integer() or abs(exponent) > 4:
        raise NotElementwise
    return power(reader.read(op["input"]), int(exponent))


def _read_function(reader: _Reader, op: Op) -> Polynomial:
    return apply(op.kind, reader.read(op["input"]))


def _read_activation(reader: _Reader, op: Op) -> Polynomial:
    row = called_activation(op)
    if row is None:
        raise NotElementwise
    return apply(row.name, reader.read(op["input"]), *(_number(op[name]) for name in row.constants))


def _read_hardsigmoid(reader: _Reader, op: Op) -> Polynomial:
    """`relu6(x + 3) / 6`, with hardtanh's zero gradient at both kinks."""
    clipped = apply("hardtanh", add(reader.read(op["input"]), constant(3.0)), 0.0, 6.0)
    return multiply(constant(1 / 6), clipped)


# PReLU has a tensor among its constants.
_RULES: dict[str, Callable[[_Reader, Op], Polynomial]] = {
    **{row.kind: _read_activation for row in ACTIVATIONS.values() if row.called and row.name != "prelu"},
    "add": _read_add,
    "sub": _read_sub,
    "mul": lambda reader, op: multiply(reader.read(op["input"]), reader.read(op["other"])),
    "div": _read_div,
    "neg": lambda reader, op: multiply(constant(-1.0), reader.read(op["input"])),
    "pow": _read_pow,
    "square": lambda reader, op: power(reader.read(op["input"]), 2),
    "reciprocal": lambda reader, op: apply("reciprocal", reader.read(op["input"])),
    "reshape": lambda reader, op: reader.read(op["input"]),
    "cast": lambda reader, op: reader.read(op["input"]),
    "dropout": lambda reader, op: reader.read(op["input"]),
    "hardsigmoid": _read_hardsigmoid,
    "hardswish": lambda reader, op: multiply(reader.read(op["input"]), _read_hardsigmoid(reader, op)),
    **dict.fromkeys(("erf", "exp", "log", "log1p"), _read_function),
}


def same(a: Polynomial, b: Polynomial, tolerance: float) -> bool:
    """Whether two normal forms are equal up to a relative `tolerance` of their constants."""
    return same_structure(a, b) and all(
        math.isclose(c1, c2, rel_tol=tolerance) for c1, c2 in zip(_constants(a), _constants(b), strict=True)
    )


def same_structure(a: Polynomial, b: Polynomial) -> bool:
    """Whether two normal forms differ in their constants at most."""
    return bool(_structure(a) == _structure(b))


def first_difference(a: Polynomial, b: Polynomial, tolerance: float) -> tuple[float, float] | None:
    """The first pair of constants that differ by more than `tolerance` in two forms of the same structure."""
    for pair in zip(_constants(a), _constants(b), strict=True):
        if not math.isclose(*pair, rel_tol=tolerance):
            return pair
    return None


def _structure(p: Polynomial) -> Any:
    return tuple(
        tuple(
            (name, len(parameters), _structure(argument), exponent)
            for (name, parameters, argument), exponent in monomial
        )
        for monomial, _ in _by_structure(p)
    )


def _constants(p: Polynomial) -> list[float]:
    found: list[float] = []
    for monomial, coefficient in _by_structure(p):
        found.append(coefficient)
        for (_, parameters, argument), _ in monomial:
            found += [*parameters, *_constants(argument)]
    return found


def _by_structure(p: Polynomial) -> list[tuple[Monomial, float]]:
    """Terms in an order that does not depend on constants inside atoms (which may differ by rounding)."""

    def key(term: tuple[Monomial, float]) -> str:
        return repr([(name, _structure(argument), exponent) for (name, _, argument), exponent in term[0]])

    return sorted(p, key=key)
