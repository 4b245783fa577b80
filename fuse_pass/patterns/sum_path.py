"""The sum that a norm normalises, and the way up to it through what belongs to neither."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fuse_pass.graph.canonical import Op, permutation
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import keeps_rows, same_shape, value_of
from fuse_pass.graph.view import GraphView, is_active_dropout
from fuse_pass.ops.fake_quantize import FakeQuantize
from fuse_pass.ops.fake_quantize_int import FakeQuantizeInt
from fuse_pass.ops.fused_op import declaration_of
from fuse_pass.ops.packed_format import pack
from fuse_pass.ops.straight_through import StraightThrough
from fuse_pass.report import Reason


class SumPath:
    """What lies between a norm and the value that it is fused with.

    Args:
        view: the graph.
        start: what the norm reads.

    Attributes:
        top: that value.
        nodes: casts, reshapes, permutations, inactive dropouts and a fake quantisation; the one the norm reads first.
        moves: those of them that put rows in another place.
        quantised: the fake quantisation, if there is one.
        sum_format: its settings as `ops.packed_format` has them; empty where there is none.
        problem: the first thing that stands in the way.
    """

    def __init__(self, view: GraphView, start: Any) -> None:
        self.top = start
        self.nodes: list[Node] = []
        self.moves: list[Node] = []
        self.quantized: Node | None = None
        self.sum_format: list[int] = []
        self.problem: Problem | None = None
        self._view = view
        while isinstance(self.top, Node) and self._pass(self.top):
            pass

    def _pass(self, node: Node) -> bool:
        """One step up, if the node is none that a norm is fused with."""
        op = self._view.op(node)
        if op is None:
            return self._pass_quantization(node)
        in_the_way = op.kind == "dropout" and (is_active_dropout(op) or op.in_place)
        in_the_way = in_the_way or (op.kind in MOVING and value_of(op["input"]) is None)  # a part of a tuple
        if op.kind not in _PASSED or in_the_way or not node.args:
            return False
        if op.kind in MOVING:
            self.problem = self.problem or _problem_of_move(op)
            self.moves += [] if op.kind == "getitem" else [node]
        self.nodes.append(node)
        self.top = node.args[0]
        return True

    def _pass_quantization(self, node: Node) -> bool:
        op = declaration_of(node.target)
        if op not in (FakeQuantize, FakeQuantizeInt, StraightThrough) or self.quantized is not None:
            return False
        call: Any = op.of_call(node.args, node.kwargs)
        if op is FakeQuantize and call.seed is None and not call.clip_grad:
            self.sum_format = pack(call.how)
        else:
            detail = f"{node.name} rounds at random, by a scale of its own or with clipped gradients"
            self.problem = Problem(Reason.QUANTIZATION, detail, node)
        self.nodes.append(node)
        self.quantized, self.top = node, call.x
        return True

    def of_kind(self, *kinds: str) -> tuple[Node, ...]:
        """The nodes of some kinds in graph order."""
        return tuple(node for node in reversed(self.nodes) if self._view.kind(node) in kinds)

    def up_to_dropout(self) -> SumPath:
        """The path up to its first inactive dropout, for where there is no sum above it."""
        dropout = next((node for node in self.nodes if self._view.kind(node) == "dropout"), None)
        if dropout is None:
            return self
        path = copy.copy(self)
        path.top, path.nodes = dropout, self.nodes[: self.nodes.index(dropout)]
        path.moves = [move for move in self.moves if move in path.nodes]
        if self.quantized not in path.nodes:
            path.quantized, path.sum_format = None, []
        if self.problem is not None and self.problem.node not in path.nodes:
            path.problem = None
        return path

    def read_only_by(self, norm: Iterable[Node]) -> list[Node]:
        """The part that only leads to the norm; what others read stays, and so does everything above it."""
        readers, vanishing = set(norm), []
        for node in self.nodes:
            if not set(node.users) <= readers:
                break
            vanishing.append(node)
            readers = {node}
        return vanishing


MOVING = ("permute", "transpose", "roll", "getitem")
_PASSED = ("cast", "reshape", "dropout", *MOVING)


def channels_apart(node: Node) -> Problem:
    """What a norm over the channels of an image `[N, C, H, W]` is declined with.

    On one AMD Zen 5 core, forward and backward of `[8, 96, 28, 28]` took a fused op that reads the permuted sum 1.1 to
    1.4 times as long as Inductor's own kernels; one that does GroupNorm took as long as they, and 1.15 times as long in
    inference.
    """
    return Problem(Reason.COST, f"{node.name}: the channels that are normalised do not lie side by side", node)


def _problem_of_move(op: Op) -> Problem | None:
    """Whole rows may change places: the norm of each stays what it is."""
    before, after = value_of(op["input"]), value_of(op.node)
    assert before is not None
    if op.kind == "getitem":  # rows that are cut off have a gradient of zero, whatever their values
        if _is_slice(op["other"]) and after is not None and same_shape(before.shape, after.shape):
            return None
        if keeps_rows(before, after):
            return Problem(Reason.COST, f"{op.node.name} leaves rows out: the sum is needed all the same", op.node)
        return Problem(Reason.LAYOUT, f"{op.node.name} changes the rows", op.node)
    moved = _moved_dimensions(op, before.dim())
    if moved is not None and before.dim() - 1 not in moved:
        return None
    return (
        Problem(Reason.LAYOUT, f"{op.node.name} changes the rows", op.node)
        if op.kind == "roll"
        else channels_apart(op.node)
    )


def _is_slice(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is Ellipsis or (isinstance(part, slice) and part.step in (None, 1)) for part in parts)


def _moved_dimensions(op: Op, rank: int) -> set[int] | None:
    """The dimensions that do not stay where they are."""
    if op.kind != "roll":
        order = permutation(op, rank)
        return None if order is None else {i for i, dim in enumerate(order) if dim != i}
    dims = op["dims"] if isinstance(op["dims"], (tuple, list)) else (op["dims"],)
    return {dim % rank for dim in dims} if all(isinstance(dim, int) for dim in dims) else None


@dataclass(frozen=True)
class Sum:
    """`z = dropout(x) + residual` as it stands in the graph."""

    node: Node
    x: Node
    residual: Node | None
    p: Any
    nodes: tuple[Node, ...]
    residual_first: bool = False
    problem: Problem | None = None


def sum_at(view: GraphView, node: Any) -> Sum | None:
    op = view.op(node)
    if op is None or node in view.linears:
        return None
    if op.kind == "dropout":
        return _dropout_alone(view, op)
    if op.kind != "add" or value_of(op["input"]) is None or value_of(op["other"]) is None:
        return None
    problem = None
    if op["alpha"] != 1:
        problem = Problem(Reason.CONSTANTS, f"{node.name} adds with alpha={op['alpha']}", node)
    elif op.in_place and not view.owns_its_input(op):
        problem = Problem(Reason.MUTATION, f"{node.name} writes into {op['input'].name}, which others may read", node)
    first, second = op["input"], op["other"]
    for branch, residual in ((first, second), (second, first)):
        dropout = view.op(branch)
        if dropout is None or dropout.kind != "dropout" or len(branch.users) != 1 or branch is residual:
            continue
        inner = _dropout_alone(view, dropout)
        nodes = (node, branch)
        return Sum(node, inner.x, residual, inner.p, nodes, residual is first, problem or inner.problem)
    swapped = not have_same_shape(first, node)
    x, residual = (second, first) if swapped else (first, second)
    return Sum(node, x, residual, 0, (node,), swapped, problem)


def _dropout_alone(view: GraphView, op: Op) -> Sum:
    problem = None
    if op.in_place and not view.owns_its_input(op):
        problem = Problem(Reason.MUTATION, f"{op.node.name} drops in place what others may read", op.node)
    if not isinstance(op["training"], bool):
        problem = Problem(Reason.CONSTANTS, f"{op.node.name}: training is {op['training']}, not a constant", op.node)
    return Sum(op.node, op["input"], None, op["p"] if is_active_dropout(op) else 0, (op.node,), problem=problem)


def have_same_shape(a: Node, b: Node) -> bool:
    x, y = value_of(a), value_of(b)
    return x is not None and y is not None and same_shape(x.shape, y.shape)
