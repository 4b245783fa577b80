"""Which norm a computation is: called by name, or LayerNorm and RMSNorm written out in any algebraically equal way.

    rms_norm     x·R [·w] [+ b]          R = rsqrt(mean(x²) + eps)
    layer_norm   (x·R - M·R) [·w] [+ b]  R = rsqrt(mean(x²) - M² + eps),  M = mean(x)

Half types are computed in float32 and cast back at the end or, as Llama does, before the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from fuse_pass.graph.canonical import Op
from fuse_pass.graph.expression import NotElementwise, Polynomial, add, constant, multiply, power, same
from fuse_pass.graph.row_statistics import (
    REDUCTIONS,
    RowReader,
    X,
    atom,
    dims_of,
    factors,
    leaf_numbers,
    mean,
    split_constant,
    variance,
)  # fmt: skip
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import same_shape, value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.numerics.tensors import accumulation_dtype
from fuse_pass.patterns.sum_path import channels_apart
from fuse_pass.report import Reason


@dataclass(frozen=True)
class Norm:
    """A norm in a graph.

    Attributes:
        kind: "layer_norm" or "rms_norm".
        node: its result.
        input: what it normalises.
        shape: the sizes of the normalised dimensions.
        weight: multiplies the normalised value, or None.
        bias: is added at the end, or None.
        eps: number, node where the graph computes it, None for the default of its dtype.
        nodes: every node that it consists of.
        round_normalised: whether the value is cast to the dtype of the result before the weight multiplies it.
        problem: set where it is a norm in all but one thing.
    """

    kind: str
    node: Node
    input: Any
    shape: Any
    weight: Node | None
    bias: Node | None
    eps: Any
    nodes: tuple[Node, ...]
    round_normalised: bool = False
    problem: Problem | None = None


def norms_of(view: GraphView) -> Iterator[Norm]:
    """Every norm of a graph, in order of their first nodes; of a chain of results the longest that is a norm."""
    for node in view.nodes:
        op = view.op(node)
        if op is None:
            continue
        if op.kind in ("layer_norm", "rms_norm"):
            arguments = (op["input"], op["normalized_shape"], op["weight"], op.arguments.get("bias"), op["eps"])
            yield Norm(op.kind, node, *arguments, (node,))
        elif op.kind == "group_norm":
            arguments = (op["input"], None, op["weight"], op["bias"], op["eps"])
            yield Norm(op.kind, node, *arguments, (node,), problem=channels_apart(node))
        elif op.kind in ("rsqrt", "sqrt", "std") or (op.kind == "pow" and op["exponent"] in (0.5, -0.5)):
            norm = _written_out(view, op)
            if norm is not None:
                yield norm


def _written_out(view: GraphView, deviation: Op) -> Norm | None:
    """The norm that divides by this deviation."""
    reduction = deviation if deviation.kind == "std" else _reduction_above(view, deviation["input"])
    if reduction is None:
        return None
    x = _normalised_by(view, reduction)
    value = value_of(x)
    dims = None if value is None else dims_of(reduction, value.dim())
    if value is None or not dims or not value.is_floating_point() or max(dims) >= 0 or -min(dims) > value.dim():
        return None
    reader = RowReader(view, x, dims)
    return _grown_from(view, reader, deviation.node)


def _reduction_above(view: GraphView, node: Any, depth: int = 6) -> Op | None:
    """The nearest reduction that a value is computed from by arithmetic."""
    op = view.op(node)
    if op is None or depth == 0:
        return None
    if op.kind in REDUCTIONS:
        return op
    if op.kind not in ("add", "sub", "mul", "div", "pow", "square", "cast", "reshape", "getitem"):
        return None
    for name in ("input", "other"):
        found = _reduction_above(view, op.arguments.get(name), depth - 1)
        if found is not None:
            return found
    return None


def _normalised_by(view: GraphView, reduction: Op) -> Node:
    """The value whose row statistics a reduction takes: x of `mean(x)`, `mean(x²)` and `mean((x - mean(x))²)`."""
    node: Node = reduction["input"]
    while (op := view.op(node)) is not None:
        is_square = op.kind == "square" or (op.kind == "pow" and op["exponent"] == 2)
        is_square = is_square or (op.kind == "mul" and op["input"] is op["other"])
        if not (is_square or op.kind == "cast" or _is_centred(view, op)) or not isinstance(op["input"], Node):
            break
        node = op["input"]
    return node


def _is_centred(view: GraphView, op: Op) -> bool:
    """Whether a difference is `x - mean(x)`."""
    centre = view.op(_uncast(view, op["other"])) if op.kind == "sub" else None
    if centre is None or centre.kind != "mean":
        return False
    return _uncast(view, centre["input"]) is _uncast(view, op["input"])


def _uncast(view: GraphView, node: Any) -> Any:
    while view.kind(node) == "cast":
        node = node.args[0]
    return node


def _grown_from(view: GraphView, reader: RowReader, node: Node) -> Norm | None:
    """Follows the readers of a value for as long as the result may still be a norm."""
    found: Norm | None = None
    while True:
        reader.values.clear()
        try:
            polynomial = reader.read(node)
        except NotElementwise:
            return found
        norm = _norm_of(view, reader, node, polynomial)
        found = norm or found
        readers = sorted((user for user in node.users if user in view.position), key=view.position.__getitem__)
        if not readers or (norm is not None and len(readers) > 1) or readers[0].op == "output":
            return found
        node = readers[0]


def _norm_of(view: GraphView, reader: RowReader, node: Node, polynomial: Polynomial) -> Norm | None:
    """The norm whose result a normal form is, or None."""
    inverse, difference = _inverse_deviation(polynomial)
    if inverse is None or not same_shape(value_of(node).shape, reader.x_value.shape):  # type: ignore[union-attr]
        return None
    ((((name, _, spread), _),), _) = inverse[0]
    varies, rest = split_constant(spread if name == "rsqrt" else _of_root(spread))
    statistics = {"rms_norm": mean(power(X, 2)), "layer_norm": variance(X)}
    centred = {"rms_norm": X, "layer_norm": add(X, mean(X), -1.0)}
    for kind, statistic in statistics.items():
        normalised = multiply(centred[kind], inverse)
        parameters = _parameters(reader, polynomial, normalised)
        if parameters is None or len(varies) != len(statistic):
            continue
        ratio = varies[0][1] / statistic[0][1]
        if not same(varies, multiply(constant(ratio), statistic), 1e-6):
            continue
        eps, problem = _eps(reader, node, rest)
        if difference is not None or abs(ratio - 1) > 1e-6:
            detail = difference or f"the variance is {ratio:.6g} times that of a norm, as an unbiased one is"
            problem = Problem(Reason.CONSTANTS, detail, node)
        rank = reader.x_value.dim()
        nodes = _without_shared_casts(view, reader)
        norm = Norm(kind, node, reader.x, tuple(reader.x_value.shape[rank + d] for d in reader.dims), *parameters, eps,
                    nodes, problem=problem)  # fmt: skip
        return _with_dtypes(view, reader, _with_layout(norm, reader), normalised)
    return None


def _inverse_deviation(polynomial: Polynomial) -> tuple[Polynomial | None, str | None]:
    """The one factor by which every term with x is divided, and how it differs from that of a norm."""
    inverses = factors(polynomial, "rsqrt")
    if len(inverses) == 1:
        return atom("rsqrt", inverses.pop()[2]), None
    reciprocals = [found for found in factors(polynomial, "reciprocal") if factors(found[2], "sqrt")]
    if len(reciprocals) == 1 and not inverses:
        return atom("reciprocal", reciprocals[0][2]), "eps is added to the deviation instead of the variance"
    return None, None


def _of_root(spread: Polynomial) -> Polynomial:
    """The variance of `deviation + eps`."""
    (deviation, *others) = factors(spread, "sqrt")
    return () if others else deviation[2]


def _parameters(reader: RowReader, p: Polynomial, normalised: Polynomial) -> tuple[Node | None, Node | None] | None:
    """Weight and bias with which a normal form is `normalised · weight + bias`."""
    leaves: list[int | None] = [None, *leaf_numbers(p)]
    for weight in leaves:
        scaled = normalised if weight is None else multiply(normalised, atom("leaf", (), weight))
        for bias in leaves:
            expected = scaled if bias is None else add(scaled, atom("leaf", (), bias))
            if same(p, expected, 1e-6):
                return tuple(None if i is None else reader.leaves[i] for i in (weight, bias))  # type: ignore[return-value]
    return None


def _eps(reader: RowReader, node: Node, terms: list[Any]) -> tuple[Any, Problem | None]:
    """The constant beside the variance: a number, or a node where the graph computes it."""
    if not terms:
        return None, Problem(Reason.CONSTANTS, "nothing is added to the variance", node)
    if len(terms) == 1:
        monomial, coefficient = terms[0]
        if not monomial:
            return coefficient, None
        if len(monomial) == 1 and monomial[0][0][0] == "scalar" and monomial[0][1] == 1 and coefficient == 1:
            return reader.scalars[int(monomial[0][0][1][0])], None
    return None, Problem(Reason.CONSTANTS, "eps is a tensor, expected a number", node)


def _without_shared_casts(view: GraphView, reader: RowReader) -> tuple[Node, ...]:
    """The nodes of the norm; a cast of x that others read too stays, as it is no part of the arithmetic."""
    nodes = list(reader.values)
    for cast in [node for node in nodes if view.kind(node) == "cast" and node.args[0] is reader.x]:
        if any(user not in reader.values for user in cast.users):
            nodes.remove(cast)
    return tuple(nodes)


def _with_layout(norm: Norm, reader: RowReader) -> Norm:
    """The op normalises the last dimensions."""
    rank = reader.x_value.dim()
    if norm.problem is not None or reader.dims == tuple(range(-len(reader.dims), 0)):
        return norm
    if reader.dims == (1 - rank,) and norm.weight is not None:
        return replace(norm, problem=channels_apart(norm.node))
    detail = f"{norm.node.name} normalises the dimensions {reader.dims}, which are not the last"
    return replace(norm, problem=Problem(Reason.LAYOUT, detail, norm.node))


def _with_dtypes(view: GraphView, reader: RowReader, norm: Norm, normalised: Polynomial) -> Norm:
    """The arithmetic must be that of the op: in float32 or wider, and rounded at the end or before the weight."""
    if norm.problem is not None:
        return norm
    dtypes = {node: value.dtype for node in norm.nodes if (value := value_of(node)) is not None}
    x, y = value_of(norm.input), value_of(norm.node)
    assert x is not None
    assert y is not None
    wide = accumulation_dtype(y.dtype)
    narrow = sorted((node for node, dtype in dtypes.items() if dtype is not wide), key=view.position.__getitem__)
    if not narrow and torch.promote_types(x.dtype, wide) is wide:
        return norm
    if narrow and x.dtype is y.dtype and all(dtypes[node] is y.dtype for node in narrow):
        kinds = [view.kind(node) for node in narrow]
        affine = ["mul"] * (norm.weight is not None) + ["add"] * (norm.bias is not None)
        if narrow == [norm.node] and kinds == ["cast"]:
            return norm
        if kinds == ["cast", *affine] and same(reader.values[narrow[0]], normalised, 1e-6):
            return replace(norm, round_normalised=True)
    blamed = narrow[0] if narrow else norm.node
    detail = f"{blamed.name} is {dtypes[blamed]} within a norm of {x.dtype} that gives {y.dtype}"
    return replace(norm, problem=Problem(Reason.DTYPES, detail, blamed))
