"""A Dynamo graph as the matcher reads it: canonical operations, Linear layers, order, and what must not be crossed."""

from __future__ import annotations

import bisect
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from fuse_pass.graph.canonical import Op, Operations, canonical, is_weight_transpose
from fuse_pass.graph.einsum import linear_equation
from fuse_pass.graph.shapes import keeps_rows, memory_of, same_size, value_of
from fuse_pass.inductor import compiler, private
from fuse_pass.report import Reason


@dataclass(frozen=True)
class Linear:
    """`y = x Wᵀ + b` in any spelling.

    Attributes:
        node: the node whose value is y.
        input: x.
        weight: W, or Wᵀ if `transposed`.
        bias: b or None.
        transposed: True where the weight is stored `[in, out]`, as in GPT-2's Conv1D.
        nodes: every node that the layer consists of.
        features: the dimension of x and y that it acts along; 1 for a 1×1 convolution, with W `[out, in, 1, ...]`.
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    transposed: bool
    nodes: tuple[Node, ...]
    features: int = -1


@dataclass(frozen=True)
class Modes:
    """What is switched on at a place of a graph.

    Attributes:
        autocast: arguments of the open autocast regions, outermost first.
        inference: the calls that opened the inference-mode regions.
        grad: whether gradients are recorded; None before the first switch of a graph, where it does not say.
    """

    autocast: tuple[tuple[Any, ...], ...] = ()
    inference: tuple[Node, ...] = ()
    grad: bool | None = None


@dataclass(frozen=True)
class Walk:
    """The result of walking up through nodes that do not change values: `node` is where it ended."""

    node: Node
    passed: tuple[Node, ...]
    casts: tuple[Node, ...]
    moves_rows: Node | None


class GraphView:
    """Read-only answers about one graph; made anew after every change of the graph.

    Args:
        graph: the graph.
        autocast: arguments of the autocast regions in which the graph as a whole is called, outermost first.
        operations: what earlier views of the graph have read.
    """

    def __init__(
        self, graph: Graph, autocast: Sequence[tuple[Any, ...]] = (), operations: Operations | None = None
    ) -> None:
        self.graph = graph
        self._autocast = autocast
        self.nodes = tuple(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self._operations = operations or Operations()
        self._ops: dict[Node, Op | None] = {}

    def op(self, node: Any) -> Op | None:
        if not isinstance(node, Node):
            return None
        if node not in self._ops:
            self._ops[node] = self._operations.of(node)
        return self._ops[node]

    def kind(self, node: Any) -> str | None:
        op = self.op(node)
        return None if op is None else op.kind

    # --- Linear layers

    @cached_property
    def linears(self) -> dict[Node, Linear]:
        """Every Linear by the node of its output; a product that a bias is added to counts as one with its bias."""
        found: dict[Node, Linear] = {}
        for node in self.nodes:
            layer = self._linear(node, found)
            if layer is not None:
                for part in layer.nodes:
                    found.pop(part, None)
                found[node] = layer
        return found

    def _linear(self, node: Node, found: dict[Node, Linear]) -> Linear | None:
        op = self.op(node)
        if op is None:
            return None
        if op.kind == "linear":
            return self._layer(node, op["input"], op["weight"], op["bias"], transposed=False)
        if op.kind == "addmm" and op["beta"] == 1 and op["alpha"] == 1:
            return self._layer(node, op["mat1"], op["mat2"], op["input"], transposed=True)
        if op.kind == "matmul":
            return self._layer(node, op["input"], op["other"], None, transposed=True)
        if op.kind == "einsum":
            return self._einsum(op)
        if op.kind == "add" and op["alpha"] == 1:
            operands = [(op["input"], op["other"]), (op["other"], op["input"])]
            for product, bias in operands[:1] if op.in_place else operands:  # `bias += product` writes into the bias
                inner = found.get(product) if isinstance(product, Node) else None
                if inner is not None and inner.bias is None and len(product.users) == 1:
                    layer = self._layer(node, inner.input, inner.weight, bias, transposed=inner.transposed)
                    if layer is not None:
                        return Linear(**{**vars(layer), "nodes": (*inner.nodes, node)})
        return None

    def _einsum(self, op: Op) -> Linear | None:
        operands = op["operands"]
        operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
        equation = linear_equation(op["equation"]) if isinstance(op["equation"], str) else None
        if equation is None or len(operands) != 2:
            return None
        x, weight = operands[equation.x], operands[1 - equation.x]
        layer = self._layer(op.node, x, weight, None, transposed=equation.transposed)
        x_value, weight_value = value_of(x), value_of(weight)
        if layer is None or x_value is None or weight_value is None:
            return None
        # Unlike other products, einsum stretches an index of size 1, and of one element it makes no sum at all: under
        # autocast its result has the dtype of a multiplication.
        in_features = weight_value.shape[0 if equation.transposed else 1]
        is_sum = same_size(x_value.shape[-1], in_features) and not same_size(in_features, 1)
        return layer if is_sum else None

    def _layer(self, node: Node, x: Any, weight: Any, bias: Any, *, transposed: bool) -> Linear | None:
        weight_op = self.op(weight) if transposed else None
        if weight_op is not None and is_weight_transpose(weight_op):
            weight, transposed = weight_op["input"], False
        x_value, weight_value = value_of(x), value_of(weight)
        if x_value is None or weight_value is None or weight_value.dim() != 2 or x_value.dim() == 0:
            return None
        if bias is not None:
            bias_value = value_of(bias)
            out_features = weight_value.shape[1 if transposed else 0]
            if bias_value is None or bias_value.dim() != 1 or not same_size(bias_value.shape[0], out_features):
                return None
        return Linear(node, x, weight, bias, transposed, (node,))

    # --- walking

    def walk_up(self, node: Node) -> Walk:
        """From a value up to where it was computed, through reshapes, casts and inactive dropout."""
        passed: list[Node] = []
        casts: list[Node] = []
        moves_rows = None
        while True:
            op = self.op(node)
            if op is None or node in self.linears or op.kind not in ("reshape", "cast", "dropout"):
                break
            if op.kind == "dropout" and (is_active_dropout(op) or (op.in_place and not self.owns_its_input(op))):
                break
            source = op["input"]
            before, after = value_of(source), value_of(node)
            if before is None or after is None:
                break
            if op.kind == "reshape" and not keeps_rows(before, after):
                moves_rows = moves_rows or node
            if before.dtype is not after.dtype:
                casts.append(node)
            if before.device != after.device:
                break
            passed.append(node)
            node = source
        return Walk(node, tuple(passed), tuple(casts), moves_rows)

    def owns_its_input(self, op: Op) -> bool:
        """Whether an in-place operation writes to memory that nothing else can read, so that it may count as pure.

        True if everything up to the operation that allocated the memory has a single reader.
        """
        node = op["input"]
        while isinstance(node, Node) and len(node.users) == 1:
            source = self.op(node)
            if node in self.linears or _allocates(node):
                return True
            if source is None or source.kind == "getitem":
                return False
            is_alias = source.in_place or source.kind in _ALIASING or _may_return_its_input(source)
            if not is_alias:
                return True
            node = source["input"]
        return False

    # --- order and regions

    @cached_property
    def _barriers(self) -> tuple[list[int], list[tuple[Node, Reason]]]:
        reasons = ((i, node, barrier(node, self.op)) for i, node in enumerate(self.nodes))
        found = [(i, node, reason) for i, node, reason in reasons if reason is not None]
        return [i for i, _, _ in found], [(node, reason) for _, node, reason in found]

    def barriers_between(self, first: Node, last: Node) -> Iterator[tuple[Node, Reason]]:
        """Nodes strictly between two others that no value may be moved across."""
        positions, entries = self._barriers
        start = bisect.bisect_right(positions, self.position[first])
        end = bisect.bisect_left(positions, self.position[last])
        yield from entries[start:end]

    def last_write(self, value: torch.Tensor) -> Node | None:
        """The last node that may write into the memory of a tensor."""
        return next(reversed(self.writes_to(value)), None)

    def writes_to(self, value: torch.Tensor) -> list[Node]:
        """The nodes that may write into the memory of a tensor, in order."""
        return self._writes.get(memory_of(value), [])

    @cached_property
    def _writes(self) -> dict[int, list[Node]]:
        """The nodes that may write into it, by storage."""
        found: dict[int, list[Node]] = {}
        for node, reason in self._barriers[1]:
            op = self.op(node)
            reached = node.all_input_nodes if op is None or not op.in_place else [op["input"]]
            for written in reached if reason is Reason.MUTATION else ():
                value = value_of(written)
                if value is not None and value.layout is torch.strided:  # others have no one storage, and no match
                    found.setdefault(memory_of(value), []).append(node)
        return found

    @cached_property
    def _functorch_switches(self) -> list[tuple[int, int]]:
        """Positions at which a torch.func transform begins (+1) or ends (-1)."""
        steps = {"increment": 1, "decrement": -1}
        found = ((i, _FUNCTORCH.search(getattr(node.target, "__name__", ""))) for i, node in enumerate(self.nodes))
        return [(i, steps[match[1]]) for i, match in found if match is not None]

    def is_in_functorch(self, node: Node) -> bool:
        """Whether the node lies inside a torch.func transform (vmap, grad, jvp, …)."""
        switches, depths = self._functorch_depths
        return depths[bisect.bisect_left(switches, self.position[node])] > 0

    @cached_property
    def _functorch_depths(self) -> tuple[list[int], list[int]]:
        """The switches' positions, and how many transforms are open before the first and after each."""
        switches = [i for i, _ in self._functorch_switches]
        return switches, list(itertools.accumulate((step for _, step in self._functorch_switches), initial=0))

    def autocast_stack(self, node: Node) -> list[tuple[Any, ...]]:
        """Arguments of the autocast regions that are open at a node, outermost first."""
        return [*self.modes_at(node).autocast]

    def modes_at(self, node: Node) -> Modes:
        """The modes in which a node is called; those before it, where it is a switch itself."""
        switches, modes = self._modes
        return modes[bisect.bisect_left(switches, self.position[node])]

    def is_switch(self, node: Node) -> bool:
        """Whether a node switches autocast, grad mode or inference mode."""
        switches, place = self._modes[0], self.position.get(node, -1)
        i = bisect.bisect_left(switches, place)
        return i < len(switches) and self.nodes[switches[i]] is node

    @cached_property
    def _modes(self) -> tuple[list[int], list[Modes]]:
        """The switches' positions, and the modes before the first and after each."""
        switches, modes = [], [Modes(tuple(self._autocast))]
        autocast: list[Node] = []
        inference: list[Node] = []
        grad = None
        for i, (node, reason) in zip(*self._barriers, strict=True):
            if reason is Reason.MUTATION:
                continue
            if node.target in _GRAD_SWITCHES:
                grad = node.args[0] if node.args and isinstance(node.args[0], bool) else None
            else:
                is_open = inference if reason is Reason.GRAD_MODE else autocast
                if closed := [enter for enter in is_open if enter in node.args]:
                    is_open[:] = [enter for enter in is_open if enter not in closed]
                elif node.target is not private.AUTOCAST_EXIT:
                    is_open.append(node)
            switches.append(i)
            modes.append(Modes((*self._autocast, *(enter.args for enter in autocast)), tuple(inference), grad))
        return switches, modes


# Operations that may return their input or a view of it.
_ALIASING = ("reshape", "cast", "matrix_transpose", "transpose", "permute", "getattr", "chunk", "split", "narrow")


# Functions outside the table of canonical operations whose result is always a tensor of its own.
_ALLOCATING = (F.embedding, torch.embedding, F.batch_norm, torch.cat, torch.stack)


def _allocates(node: Node) -> bool:
    """Whether a node is the result of such a function or of an op of ours, which keep others for backward, if any."""
    is_first = node.target is operator.getitem and node.args[1] == 0
    call = node.args[0] if is_first else node
    if not isinstance(call, Node) or call.op != "call_function":
        return False
    is_ours = isinstance(call.target, private.OpOverload) and call.target.namespace == "fuse_pass"
    return is_ours or node.target in _ALLOCATING


def _may_return_its_input(op: Op) -> bool:
    """Whether a dropout is inactive, or could turn out so at run time."""
    if op.kind != "dropout":
        return False
    return not is_active_dropout(op) or not isinstance(op["p"], (int, float)) or op["training"] is not True


def is_active_dropout(op: Op) -> bool:
    """Whether a dropout drops anything; a p that is only known at run time counts as active."""
    return op["training"] is not False and not (isinstance(op["p"], (int, float)) and op["p"] == 0)


# The name of an operation that writes into an argument or sets a state, as Inductor's own pattern matcher tells it.
_MUTATING_NAME = re.compile(
    r"(?<!_)(_$|_[.]|(\b|_)(set|enter|exit|seed)(\b|_))(?!_)"
    r"|^__(setitem|delitem|i(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift))__$"
)
_FUNCTORCH = re.compile(r"_(increment|decrement)_nesting$")
_IN_PLACE_OPERATORS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
    operator.setitem, operator.delitem,
)  # fmt: skip
# `max_norm` rescales the weight of an embedding, the running mean of a batch norm is updated.
_WRITING_OPTIONS = ("max_norm", "running_mean")
_NUMPY_CALLS = compiler.NUMPY_CALLS
_GRAD_SWITCHES = private.GRAD_SWITCHES
_AUTOCAST_SWITCHES = (private.AUTOCAST_ENTER, private.AUTOCAST_EXIT)


def barrier(node: Node, operation_of: Callable[[Node], Op | None] = canonical) -> Reason | None:
    """Why no value may be moved across a node; None where it is an ordinary pure operation."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return None
    if node.op == "call_module":
        return Reason.MUTATION  # a module that Dynamo did not open may hold state
    target = node.target
    if target in _AUTOCAST_SWITCHES:
        return Reason.AUTOCAST
    if target in _GRAD_SWITCHES or "inference_mode" in str(getattr(target, "__name__", "")):
        return Reason.GRAD_MODE
    return Reason.MUTATION if _mutates(node, operation_of) else None


def _mutates(node: Node, operation_of: Callable[[Node], Op | None]) -> bool:
    target = node.target
    if isinstance(target, (private.OpOverload, private.OpOverloadPacket)):
        return private.may_write(target)
    if isinstance(target, private.HigherOrderOperator):
        return True  # its body may
    if target in _IN_PLACE_OPERATORS or node.kwargs.get("out") is not None:
        return True
    op = operation_of(node)
    if op is not None and op.in_place:
        return True
    if op is None and _writes_by_option(node):
        return True
    if isinstance(target, _NUMPY_CALLS):
        return True  # they see the memory of the tensor behind an array
    if getattr(target, "__module__", None) == "_operator":
        return False  # `operator.and_` and its like end in an underscore without writing
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return bool(_MUTATING_NAME.search(name))


def _writes_by_option(node: Node) -> bool:
    """Calls outside the table of canonical operations: by an argument that makes the function write into another."""
    code = getattr(node.target, "__code__", None)
    names = () if code is None else code.co_varnames[: code.co_argcount]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return bool(given.get("inplace")) or any(given.get(name) is not None for name in _WRITING_OPTIONS)
