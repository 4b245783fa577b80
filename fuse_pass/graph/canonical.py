"""Every spelling of an operation → one canonical operation with named arguments.

`x + y`, `torch.add(x, other=y)`, `x.add(y)` and `x += y` are four different nodes in a Dynamo graph; here all are `add`
with `input`, `other` and `alpha`. A new spelling is one more target in the table.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fuse_pass.inductor import private
from fuse_pass.numerics.activations import ACTIVATIONS, Activation

aten = torch.ops.aten


@dataclass(frozen=True)
class Op:
    """A canonical operation.

    Attributes:
        kind: its name in the table.
        node: the graph node.
        arguments: every argument by its canonical name, defaults filled in.
        in_place: whether the node writes its result into its first argument.
    """

    kind: str
    node: Node
    arguments: Mapping[str, Any]
    in_place: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


# (kind, its parameters as a signature, the targets that spell it; a string is a tensor method)
_Row = tuple[str, Callable[..., None], tuple[Any, ...]]


def _unary(input: Any) -> None: ...
def _binary(input: Any, other: Any) -> None: ...
def _scaled_binary(input: Any, other: Any, alpha: Any = 1) -> None: ...
def _linear(input: Any, weight: Any, bias: Any = None) -> None: ...
def _addmm(input: Any, mat1: Any, mat2: Any, beta: Any = 1, alpha: Any = 1) -> None: ...
def _einsum(equation: Any, *operands: Any) -> None: ...
def _conv(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> None: ...
def _div(input: Any, other: Any, rounding_mode: Any = None) -> None: ...
def _pow(input: Any, exponent: Any) -> None: ...
def _dropout_function(input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> None: ...
def _dropout(input: Any, p: Any, train: Any) -> None: ...
def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn_enable: Any = True
) -> None: ...
def _group_norm(
    input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn_enabled: Any = True
) -> None: ...
def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> None: ...
def _mean(input: Any, dim: Any = None, keepdim: Any = False, dtype: Any = None) -> None: ...
def _deviation(
    input: Any, dim: Any = None, unbiased: Any = True, keepdim: Any = False, correction: Any = None
) -> None: ...
def _transpose(input: Any, dim0: Any, dim1: Any) -> None: ...
def _roll(input: Any, shifts: Any, dims: Any = None) -> None: ...
def _chunk(input: Any, chunks: Any, dim: Any = 0) -> None: ...
def _split(input: Any, split_size_or_sections: Any, dim: Any = 0) -> None: ...
def _narrow(input: Any, dim: Any, start: Any, length: Any) -> None: ...
def _glu(input: Any, dim: Any = -1) -> None: ...
def _variadic(input: Any, *arguments: Any, **options: Any) -> None: ...


# `W.T`, `W.mT`, `W.H`, `W.mH`: `getattr` in a graph of Dynamo, from torch 2.14 on these packets.
_MATRIX_ATTRIBUTES = (aten.numpy_T, aten.mT, aten.matrix_H, aten.mH)

_TABLE: tuple[_Row, ...] = (
    ("linear", _linear, (F.linear, aten.linear.default)),
    ("addmm", _addmm, (torch.addmm, "addmm", aten.addmm.default)),
    (
        "matmul",
        _binary,
        (operator.matmul, torch.matmul, "matmul", torch.mm, "mm", aten.matmul.default, aten.mm.default, "__matmul__"),
    ),
    ("einsum", _einsum, (torch.einsum, aten.einsum.default)),
    (
        "conv",
        _conv,
        (torch.conv1d, torch.conv2d, torch.conv3d, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    ),
    ("matrix_transpose", _unary, (torch.t, "t", aten.t.default, *_MATRIX_ATTRIBUTES)),
    ("transpose", _transpose, (torch.transpose, "transpose", torch.swapaxes, "swapaxes", aten.transpose.int)),
    ("permute", _variadic, (torch.permute, "permute", aten.permute.default)),
    ("roll", _roll, (torch.roll, "roll", aten.roll.default)),
    ("getattr", _binary, (getattr,)),
    ("getitem", _binary, (operator.getitem,)),
    ("chunk", _chunk, (torch.chunk, "chunk", aten.chunk.default)),
    ("split", _split, (torch.split, "split", aten.split.Tensor, aten.split_with_sizes.default)),
    ("narrow", _narrow, (torch.narrow, "narrow", aten.narrow.default)),
    (
        "reshape",
        _variadic,
        (
            "view",
            "reshape",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "contiguous",
            "view_as",
            "reshape_as",
            torch.reshape,
            torch.flatten,
            torch.unflatten,
            torch.squeeze,
            torch.unsqueeze,
            aten.view.default,
            aten.reshape.default,
            aten.unsqueeze.default,
            aten.contiguous.default,
            aten.alias.default,
        ),
    ),
    ("cast", _variadic, ("to", "type", "type_as", "float", "half", "bfloat16", "double", aten.to.dtype)),
    ("dropout", _dropout_function, (F.dropout,)),
    ("dropout", _dropout, (torch.dropout, aten.dropout.default)),
    ("mean", _mean, (torch.mean, "mean", aten.mean.dim)),
    ("sum", _mean, (torch.sum, "sum", aten.sum.dim_IntList)),
    ("var", _deviation, (torch.var, "var")),
    ("std", _deviation, (torch.std, "std")),
    ("var_mean", _deviation, (torch.var_mean,)),
    ("layer_norm", _layer_norm, (F.layer_norm, torch.layer_norm, aten.layer_norm.default)),
    ("rms_norm", _rms_norm, (F.rms_norm, torch.rms_norm, aten.rms_norm.default)),
    ("group_norm", _group_norm, (F.group_norm, torch.group_norm, aten.group_norm.default)),
    # arithmetic
    ("add", _scaled_binary, (operator.add, torch.add, "add", "__add__", aten.add.Tensor, aten.add.Scalar)),
    ("sub", _scaled_binary, (operator.sub, torch.sub, "sub", aten.sub.Tensor, aten.sub.Scalar)),
    ("mul", _binary, (operator.mul, torch.mul, "mul", torch.multiply, "multiply", aten.mul.Tensor, aten.mul.Scalar)),
    ("div", _div, (operator.truediv, torch.div, "div", torch.true_divide, "divide", aten.div.Tensor, aten.div.Scalar)),
    ("neg", _unary, (operator.neg, torch.neg, "neg", aten.neg.default)),
    ("pow", _pow, (operator.pow, torch.pow, "pow", aten.pow.Tensor_Scalar)),
    ("square", _unary, (torch.square, "square", aten.square.default)),
    ("sqrt", _unary, (torch.sqrt, "sqrt", aten.sqrt.default)),
    ("rsqrt", _unary, (torch.rsqrt, "rsqrt", aten.rsqrt.default)),
    ("reciprocal", _unary, (torch.reciprocal, "reciprocal", aten.reciprocal.default)),
    ("erf", _unary, (torch.erf, "erf", torch.special.erf, aten.erf.default)),
    ("exp", _unary, (torch.exp, "exp", aten.exp.default)),
    ("log", _unary, (torch.log, "log", aten.log.default)),
    ("log1p", _unary, (torch.log1p, "log1p", torch.special.log1p, aten.log1p.default)),
    *((row.kind, called.parameters, called.targets) for row in ACTIVATIONS.values() for called in row.called),
    ("glu", _glu, (F.glu, aten.glu.default)),
    # a whole nn.TransformerEncoderLayer in eval, as one call
    ("encoder_layer", _variadic, (private.ENCODER_LAYER,)),
)

# Spellings that write into their first argument, by the spelling that does not.
_IN_PLACE_METHODS = (
    *("add", "sub", "mul", "div", "neg", "pow", "square", "sqrt", "rsqrt"),
    *("exp", "erf"),
)
_IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.dropout_: torch.dropout,
    torch.square_: torch.square,
    **{f"{name}_": name for name in _IN_PLACE_METHODS},
}
for _called in (called for row in ACTIVATIONS.values() for called in row.called):
    _IN_PLACE.update(_called.in_place)

# Other names for canonical parameters: aten's and some Python signatures'.
_ALIASES = {
    "self": "input",
    "tensor": "input",
    "x": "input",
    "negval": "negative_slope",
    "train": "training",
    "split_size": "split_size_or_sections",
    "split_sizes": "split_size_or_sections",
    "axis": "dim",
}


@functools.cache
def _targets() -> dict[Any, tuple[str, inspect.Signature]]:
    table = {}
    for kind, parameters, targets in _TABLE:
        signature = inspect.signature(parameters)
        for target in targets:
            table[target] = (kind, signature)
    return table


def canonical(node: Node) -> Op | None:
    """The canonical operation of a node, or None where the table has no such spelling or its arguments do not fit."""
    if node.op not in ("call_function", "call_method"):
        return None
    target, in_place = node.target, False
    try:
        if target in _IN_PLACE:
            target, in_place = _IN_PLACE[target], True
        row = _targets().get(target)
    except TypeError:  # an unhashable callable is nobody's spelling
        return None
    if row is None:
        return None
    kind, signature = row
    if target is getattr and node.args[1:] in (("T",), ("mT",), ("H",), ("mH",)):
        return Op("matrix_transpose", node, {"input": node.args[0]})
    options = {name: value for name, value in node.kwargs.items() if name != "out" or value is not None}
    if "out" in options:
        return None
    try:
        bound = signature.bind(*node.args, **{_name(signature, name): value for name, value in options.items()})
    except TypeError:
        return None
    bound.apply_defaults()
    arguments = {_ALIASES.get(name, name): value for name, value in bound.arguments.items()}
    return Op(kind, node, arguments, in_place or bool(arguments.get("inplace", False)))


class Operations:
    """The canonical operations of nodes; one is read again only where the node has been changed since."""

    def __init__(self) -> None:
        self._known: dict[Node, tuple[Any, Any, Any, Op | None]] = {}

    def of(self, node: Node) -> Op | None:
        target, args, kwargs, op = self._known.get(node, (None, None, None, None))
        if target is not node.target or args is not node.args or kwargs is not node.kwargs:  # a change gives new ones
            op = canonical(node)
            self._known[node] = (node.target, node.args, node.kwargs, op)
        return op


def _name(signature: inspect.Signature, name: str) -> str:
    return name if name in signature.parameters else _ALIASES.get(name, name)


def called_activation(op: Op) -> Activation | None:
    """The activation that a call by name is; None for any other operation."""
    return next((row for row in _activations_by_kind().get(op.kind, ()) if _is_given(row, op)), None)


@functools.cache
def _activations_by_kind() -> dict[str, list[Activation]]:
    found: dict[str, list[Activation]] = {}
    for row in ACTIVATIONS.values():
        if row.called:
            found.setdefault(row.kind, []).append(row)
    return found


def _is_given(row: Activation, op: Op) -> bool:
    return all(op[name] == value for name, value in row.given.items())


def is_weight_transpose(op: Op | None) -> bool:
    """Whether the operation swaps the two dimensions of a real matrix: `W.t()`, `W.T`, `W.transpose(0, 1)`, …"""
    if op is None:
        return False
    value = op["input"].meta.get("example_value") if isinstance(op["input"], Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.is_complex():
        return False
    if op.kind == "matrix_transpose":
        return True
    if op.kind == "transpose":
        return {op["dim0"] % 2, op["dim1"] % 2} == {0, 1} if _are_ints(op["dim0"], op["dim1"]) else False
    if op.kind == "permute":
        dims = op["arguments"]
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        return len(dims) == 2 and _are_ints(*dims) and [d % 2 for d in dims] == [1, 0]
    return False


def permutation(op: Op, rank: int) -> list[int] | None:
    """The order in which `permute` or `transpose` puts the dimensions; None where they are no plain numbers."""
    if op.kind == "transpose":
        if not _are_ints(op["dim0"], op["dim1"]):
            return None
        order = list(range(rank))
        first, second = op["dim0"] % rank, op["dim1"] % rank
        order[first], order[second] = second, first
        return order
    dims = op["arguments"] or tuple(op["options"].values())
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return [dim % rank for dim in dims] if _are_ints(*dims) else None


def _are_ints(*values: Any) -> bool:
    return all(isinstance(value, int) for value in values)
