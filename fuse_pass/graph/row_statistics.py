"""Arithmetic of a tensor with its own row statistics in the normal form of `expression`, so that order does not matter.

    (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) * w + b  →  x·R·w - M·R·w + b,  R = rsqrt(mean(x²) - M² + eps)

Atoms are x itself, `mean` over the normalised dimensions, square roots, numbers that the graph computes, and every
tensor that does not depend on x and varies along the normalised dimensions only (`leaf`; `tensor` if it is one number).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from fuse_pass.graph.canonical import Op
from fuse_pass.graph.expression import (
    MAX_NODES,
    Atom,
    Monomial,
    NotElementwise,
    Polynomial,
    add,
    as_constant,
    constant,
    multiply,
    power,
)
from fuse_pass.graph.shapes import same_shape, same_size, value_of
from fuse_pass.graph.view import GraphView

REDUCTIONS = ("mean", "sum", "var", "std", "var_mean")


def atom(name: str, argument: Polynomial = (), *parameters: float) -> Polynomial:
    return (((((name, parameters, argument), 1),), 1.0),)


X: Polynomial = atom("x")


def mean(p: Polynomial) -> Polynomial:
    """The mean over the normalised dimensions: linear, and what does not vary along them comes out of it."""
    result: Polynomial = ()
    for monomial, coefficient in p:
        outside = tuple(factor for factor in monomial if _is_fixed(factor[0]))
        inside = tuple(factor for factor in monomial if not _is_fixed(factor[0]))
        term: Polynomial = ((outside, coefficient),)
        result = add(result, multiply(term, atom("mean", ((inside, 1.0),))) if inside else term)
    return result


def variance(p: Polynomial) -> Polynomial:
    """The biased one."""
    return add(mean(multiply(p, p)), power(mean(p), 2), -1.0)


def _is_fixed(factor: Atom) -> bool:
    """Whether an atom has one value per row."""
    name, _, argument = factor
    if name in ("mean", "scalar", "tensor"):
        return True
    return name not in ("x", "leaf") and all(_is_fixed(inner) for monomial, _ in argument for inner, _ in monomial)


def root(p: Polynomial, exponent: float) -> Polynomial:
    """`p ** exponent` for ±0.5."""
    return atom("sqrt" if exponent > 0 else "rsqrt", p)


def reciprocal(p: Polynomial) -> Polynomial:
    value = as_constant(p)
    if value is not None:
        if value == 0:
            raise NotElementwise
        return constant(1 / value)
    if len(p) == 1 and len(p[0][0]) == 1 and p[0][0][0][0][0] in ("sqrt", "rsqrt") and p[0][0][0][1] == 1:
        (((name, _, argument), _),), coefficient = p[0]
        return multiply(constant(1 / coefficient), root(argument, -0.5 if name == "sqrt" else 0.5))
    return atom("reciprocal", p)


class RowReader:
    """Reads values that are computed from `x` and its statistics over the dimensions `dims` (negative, sorted).

    Attributes:
        values: every node read so far, with its normal form.
        leaves: the tensors that do not depend on x, by their number in the atoms.
        scalars: the numbers that the graph computes, likewise.
    """

    def __init__(self, view: GraphView, x: Node, dims: tuple[int, ...]) -> None:
        value = value_of(x)
        assert value is not None
        self.view, self.x, self.dims, self.x_value = view, x, dims, value
        self.values: dict[Node, Polynomial] = {}
        self.leaves: list[Node] = []
        self.scalars: list[Node] = []
        self._depends: dict[Node, bool] = {x: True}
        self._flat: set[Node] = set()

    def read(self, value: Any) -> Polynomial:
        """Raises NotElementwise where the value is something else."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return constant(value)
        if not isinstance(value, Node):
            raise NotElementwise
        if value is self.x:
            return X
        if value in self.values:
            return self.values[value]
        if not self._depends_on_x(value):
            return self._leaf(value)
        op = self.view.op(value)
        rule = _RULES.get(op.kind) if op is not None else None
        if op is None or rule is None or len(self.values) >= MAX_NODES:
            raise NotElementwise
        if op.in_place and not self.view.owns_its_input(op):
            raise NotElementwise
        result = rule(self, op)
        self._require_shape(value, op)
        self.values[value] = result
        return result

    def varies_with_x_only_along(self, value: torch.Tensor) -> bool:
        """Whether a tensor is constant along every dimension of x that is not normalised."""
        rank = self.x_value.dim()
        return value.dim() <= rank and all(
            same_size(value.shape[i], self.x_value.shape[i] if i in self.dims else 1) for i in range(-value.dim(), 0)
        )

    @property
    def size(self) -> int:
        """Elements per row."""
        sizes = [self.x_value.shape[i] for i in self.dims]
        if not all(isinstance(size, int) for size in sizes):
            raise NotElementwise
        return math.prod(sizes)

    def _depends_on_x(self, node: Node) -> bool:
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._depends or self.view.position[top] < self.view.position[self.x]:
                self._depends.setdefault(top, False)
                stack.pop()
                continue
            unknown = [source for source in top.all_input_nodes if source not in self._depends]
            if unknown:
                stack += unknown
            else:
                self._depends[top] = any(self._depends[source] for source in top.all_input_nodes)
        return self._depends[node]

    def _leaf(self, node: Node) -> Polynomial:
        value = value_of(node)
        if value is None:
            if not isinstance(node.meta.get("example_value"), (int, float, torch.SymInt, torch.SymFloat)):
                raise NotElementwise
            return atom("scalar", (), _number_of(node, self.scalars))
        if value.dim() and not self.varies_with_x_only_along(value):
            raise NotElementwise
        return atom("leaf" if value.dim() else "tensor", (), _number_of(node, self.leaves))

    def _require_shape(self, node: Node, op: Op) -> None:
        """Every value is as large as x, or has one element per row; `flat` ones lack the dimensions of size 1.

        PyTorch aligns shapes at the end: a flat value may not meet another, though square sizes would let it.
        """
        flat = self._is_flat(node, op)
        if flat:
            self._flat.add(node)
        if op.kind == "var_mean":
            return
        value = value_of(node)
        if value is None or not value.is_floating_point():
            raise NotElementwise
        shape, rank = self.x_value.shape, self.x_value.dim()
        per_row = [1 if i - rank in self.dims else shape[i] for i in range(rank)]
        without = [shape[i] for i in range(rank) if i - rank not in self.dims]
        if not any(same_shape(value.shape, expected) for expected in ([without] if flat else [shape, per_row])):
            raise NotElementwise

    def _is_flat(self, node: Node, op: Op) -> bool:
        if op.kind in REDUCTIONS:
            return op["keepdim"] is not True
        flat = [source in self._flat for source in node.all_input_nodes if self._depends_on_x(source)]
        if not any(flat):
            return False
        if op.kind == "reshape":
            value = value_of(node)
            return value is not None and value.dim() < self.x_value.dim()
        others = [value_of(source) for source in node.all_input_nodes if not self._depends_on_x(source)]
        if not all(flat) or any(value is not None and value.dim() for value in others):
            raise NotElementwise
        return True


def _number_of(node: Node, known: list[Node]) -> int:
    if node not in known:
        known.append(node)
    return known.index(node)


def dims_of(op: Op, rank: int) -> tuple[int, ...] | None:
    """The dimensions of a reduction, negative and sorted; None where they are not plain numbers."""
    dims = op["dim"] if isinstance(op["dim"], (tuple, list)) else (op["dim"],)
    if not dims or not all(isinstance(dim, int) and not isinstance(dim, bool) for dim in dims):
        return None
    return tuple(sorted(dim - rank if dim >= 0 else dim for dim in dims))


def _reduced(reader: RowReader, op: Op) -> Polynomial:
    """What a reduction reduces, after comparing its dimensions."""
    if dims_of(op, reader.x_value.dim()) != reader.dims or op.arguments.get("dtype") is not None:
        raise NotElementwise
    # Something that has lost a dimension already would be reduced over another.
    value = value_of(op["input"])
    if value is None or not same_shape(value.shape, reader.x_value.shape):
        raise NotElementwise
    return reader.read(op["input"])


def _read_sum(reader: RowReader, op: Op) -> Polynomial:
    return multiply(constant(reader.size), mean(_reduced(reader, op)))


def _read_variance(reader: RowReader, op: Op) -> Polynomial:
    correction = op["correction"]
    if correction is None:
        correction = 1 if op["unbiased"] else 0
    if not isinstance(correction, (int, float)):
        raise NotElementwise
    biased = variance(_reduced(reader, op))
    if correction == 0:
        return biased
    if reader.size <= correction:
        raise NotElementwise
    return multiply(constant(reader.size / (reader.size - correction)), biased)


def _read_item(reader: RowReader, op: Op) -> Polynomial:
    """`torch.var_mean` is the only operation in reach that returns several tensors."""
    both = reader.view.op(op["input"])
    if both is None or both.kind != "var_mean" or op["other"] not in (0, 1):
        raise NotElementwise
    spread = reader.read(op["input"])
    return spread if op["other"] == 0 else mean(_reduced(reader, both))


def _read_power(reader: RowReader, op: Op) -> Polynomial:
    exponent = op["exponent"]
    if not isinstance(exponent, (int, float)) or isinstance(exponent, bool):
        raise NotElementwise
    base = reader.read(op["input"])
    if abs(exponent) == 0.5:
        return root(base, exponent)
    if exponent in (1, 2):
        return power(base, int(exponent))
    if exponent == -1:
        return reciprocal(base)
    raise NotElementwise


def _read_quotient(reader: RowReader, op: Op) -> Polynomial:
    if op["rounding_mode"] is not None:
        raise NotElementwise
    return multiply(reader.read(op["input"]), reciprocal(reader.read(op["other"])))


def _read_sum_of_two(sign: float) -> Callable[[RowReader, Op], Polynomial]:
    def read(reader: RowReader, op: Op) -> Polynomial:
        if not isinstance(op["alpha"], (int, float)):
            raise NotElementwise
        return add(reader.read(op["input"]), reader.read(op["other"]), sign * op["alpha"])

    return read


_RULES: dict[str, Callable[[RowReader, Op], Polynomial]] = {
    "add": _read_sum_of_two(1.0),
    "sub": _read_sum_of_two(-1.0),
    "mul": lambda reader, op: multiply(reader.read(op["input"]), reader.read(op["other"])),
    "div": _read_quotient,
    "neg": lambda reader, op: multiply(constant(-1.0), reader.read(op["input"])),
    "pow": _read_power,
    "square": lambda reader, op: power(reader.read(op["input"]), 2),
    "reciprocal": lambda reader, op: reciprocal(reader.read(op["input"])),
    "sqrt": lambda reader, op: root(reader.read(op["input"]), 0.5),
    "rsqrt": lambda reader, op: root(reader.read(op["input"]), -0.5),
    "mean": lambda reader, op: mean(_reduced(reader, op)),
    "sum": _read_sum,
    "var": _read_variance,
    "var_mean": _read_variance,
    "std": lambda reader, op: root(_read_variance(reader, op), 0.5),
    "getitem": _read_item,
    "cast": lambda reader, op: reader.read(op["input"]),
    "reshape": lambda reader, op: reader.read(op["input"]),
}


def leaf_numbers(p: Polynomial) -> Sequence[int]:
    """The leaves that occur in a normal form, outside functions."""
    found = {int(parameters[0]) for monomial, _ in p for (name, parameters, _), _ in monomial if name == "leaf"}
    return sorted(found)


def factors(p: Polynomial, name: str) -> set[Atom]:
    """The atoms of one name that occur in a normal form, outside functions."""
    return {inner for monomial, _ in p for inner, _ in monomial if inner[0] == name}


def split_constant(p: Polynomial) -> tuple[Polynomial, list[tuple[Monomial, float]]]:
    """What depends on x, and the terms that do not."""
    varies = [(m, c) for m, c in p if any(inner[0] not in ("scalar", "leaf", "tensor") for inner, _ in m)]
    return tuple(varies), [term for term in p if term not in varies]
