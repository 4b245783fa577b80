"""Every spelling of an operation becomes one canonical operation with all of its arguments."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from fuse_pass.graph.canonical import Op, Operations, canonical, is_weight_transpose
from tests.graph.dynamo import result_of, view_of

aten = torch.ops.aten
X, Y, W = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5, 5)


def op_of(function: Any, *arguments: Any) -> Op | None:
    return canonical(result_of(view_of(function, *arguments)))


SPELLINGS: list[tuple[str, dict[str, Any], Any]] = [
    ("add", {"alpha": 1}, lambda x, y, w: x + y),
    ("add", {"alpha": 1}, lambda x, y, w: torch.add(x, y)),
    ("add", {"alpha": 3}, lambda x, y, w: torch.add(input=x, other=y, alpha=3)),
    ("add", {"alpha": 1}, lambda x, y, w: x.add(y)),
    ("add", {"other": 2}, lambda x, y, w: x + 2),
    ("add", {"input": 2}, lambda x, y, w: 2 + x),
    ("add", {"alpha": 1}, lambda x, y, w: torch.ops.aten.add.Tensor(x, y)),
    ("sub", {"alpha": 1}, lambda x, y, w: x - y),
    ("mul", {"other": 0.5}, lambda x, y, w: x.multiply(0.5)),
    ("div", {"rounding_mode": None}, lambda x, y, w: x / y),
    ("div", {"rounding_mode": "floor"}, lambda x, y, w: torch.div(x, y, rounding_mode="floor")),
    ("pow", {"exponent": 2}, lambda x, y, w: x**2),
    ("matmul", {}, lambda x, y, w: x @ w),
    ("matmul", {}, lambda x, y, w: torch.mm(x, w)),
    ("matmul", {}, lambda x, y, w: x.matmul(w)),
    ("linear", {"bias": None}, lambda x, y, w: F.linear(x, w)),
    ("addmm", {"beta": 1, "alpha": 2}, lambda x, y, w: torch.addmm(y, x, w, alpha=2)),
    ("gelu", {"approximate": "none"}, lambda x, y, w: F.gelu(x)),
    ("gelu", {"approximate": "tanh"}, lambda x, y, w: F.gelu(x, approximate="tanh")),
    ("leaky_relu", {"negative_slope": 0.01}, lambda x, y, w: F.leaky_relu(x)),
    ("elu", {"alpha": 2.0}, lambda x, y, w: F.elu(x, 2.0)),
    ("softplus", {"beta": 1, "threshold": 20}, lambda x, y, w: F.softplus(x)),
    ("dropout", {"p": 0.5, "training": True}, lambda x, y, w: F.dropout(x)),
    ("dropout", {"p": 0.1, "training": False}, lambda x, y, w: F.dropout(x, 0.1, False)),
    ("dropout", {"p": 0.1, "training": True}, lambda x, y, w: torch.dropout(x, 0.1, train=True)),
    ("layer_norm", {"eps": 1e-5, "weight": None, "bias": None}, lambda x, y, w: F.layer_norm(x, (5,))),
    ("layer_norm", {"eps": 0.1}, lambda x, y, w: torch.layer_norm(x, (5,), eps=0.1)),
    ("rms_norm", {"eps": None, "weight": None}, lambda x, y, w: F.rms_norm(x, (5,))),
    ("mean", {"dim": -1, "keepdim": True}, lambda x, y, w: x.mean(-1, keepdim=True)),
    ("mean", {"dim": -1, "keepdim": False}, lambda x, y, w: torch.mean(x, axis=-1)),
    ("sum", {"dim": (0, 1), "keepdim": True}, lambda x, y, w: x.sum((0, 1), True)),
    ("var", {"unbiased": False, "keepdim": True}, lambda x, y, w: torch.var(x, -1, False, True)),
    ("var", {"unbiased": True, "correction": 0}, lambda x, y, w: x.var(-1, correction=0)),
    ("std", {"unbiased": True, "correction": None}, lambda x, y, w: x.std(-1)),
    ("rsqrt", {}, lambda x, y, w: x.rsqrt()),
    ("group_norm", {"num_groups": 1, "eps": 1e-5}, lambda x, y, w: F.group_norm(x, 1)),
    ("relu", {}, lambda x, y, w: x.relu()),
    ("reshape", {}, lambda x, y, w: x.flatten()),
    ("cast", {}, lambda x, y, w: x.double()),
]


@pytest.mark.parametrize(("kind", "arguments", "function"), SPELLINGS)
def test_spellings(kind: str, arguments: dict[str, Any], function: Any) -> None:
    op = op_of(function, X, Y, W)
    assert op is not None
    assert op.kind == kind
    assert {name: op[name] for name in arguments} == arguments
    assert not op.in_place


IN_PLACE: list[tuple[str, Any]] = [
    ("add", lambda x: x.add_(1)),
    ("mul", lambda x: operator.imul(x, 2)),
    ("relu", lambda x: x.relu_()),
    ("relu", lambda x: F.relu(x, inplace=True)),
    ("relu", lambda x: torch.relu_(x)),
    ("leaky_relu", lambda x: F.leaky_relu(x, 0.1, True)),
    ("silu", lambda x: F.silu(x, inplace=True)),
    ("dropout", lambda x: F.dropout(x, 0.5, True, True)),
    ("tanh", lambda x: x.tanh_()),
]


@pytest.mark.parametrize(("kind", "function"), IN_PLACE)
def test_in_place_spellings(kind: str, function: Any) -> None:
    op = op_of(lambda x: function(x * 1), X)
    assert op is not None
    assert op.kind == kind
    assert op.in_place


@pytest.mark.parametrize(
    "function",
    [lambda x, out: torch.add(x, 1, out=out), lambda x, out: torch.cumsum(x, 0), lambda x, out: torch.sin(x)],
    ids=["out=", "cumsum", "sin"],
)
def test_what_is_not_in_the_table_is_nothing(function: Any) -> None:
    assert op_of(function, X, Y) is None


def test_arguments_that_do_not_fit_are_nothing() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    assert canonical(x) is None
    assert canonical(graph.call_function(F.gelu, (x,), {"no_such_argument": 1})) is None
    assert canonical(graph.call_function(F.gelu, ())) is None


def test_operations_are_read_once_until_the_arguments_change() -> None:
    graph, operations = Graph(), Operations()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    node = graph.call_function(torch.add, (x, x), {"alpha": 2})
    first = operations.of(node)
    assert first is not None
    assert operations.of(node) is first
    x.replace_all_uses_with(y)
    assert operations.of(node)["input"] is y  # type: ignore[index]
    node.update_kwarg("alpha", 3)
    assert operations.of(node)["alpha"] == 3  # type: ignore[index]
    node.replace_input_with(y, x)
    assert operations.of(node)["other"] is x  # type: ignore[index]
    node.target = torch.sub
    assert operations.of(node).kind == "sub"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda w: w.t(), True),
        (lambda w: w.T, True),
        (lambda w: w.mT, True),
        (lambda w: w.H, True),
        (lambda w: w.mH, True),
        (lambda w: w.transpose(0, 1), True),
        (lambda w: w.transpose(-1, -2), True),
        (lambda w: torch.swapaxes(w, 1, 0), True),
        (lambda w: w.permute(1, 0), True),
        (lambda w: w.permute((-1, 0)), True),
        (lambda w: w.transpose(0, 0), False),
        (lambda w: w.transpose(1, -1), False),
        (lambda w: w.permute(0, 1), False),
        (lambda w: w.view(-1, 3).mT.reshape(5, 3), False),
        (lambda w: w.unsqueeze(0).mT, False),
    ],
)
def test_weight_transposes(function: Any, expected: bool) -> None:
    product = result_of(view_of(lambda w: function(w) * 2, torch.randn(5, 3)))
    assert is_weight_transpose(canonical(product.all_input_nodes[0])) is expected
    assert is_weight_transpose(None) is False


@pytest.mark.parametrize("name", ["T", "mT", "H", "mH"])
def test_an_attribute_that_transposes_is_one_operation_in_every_torch(name: str) -> None:
    """Dynamo writes `getattr` up to torch 2.13, and `aten.numpy_T`, `aten.mT`, `aten.matrix_H`, `aten.mH` after it."""
    product = result_of(view_of(lambda w: getattr(w, name) * 2, W))
    op = canonical(product.all_input_nodes[0])
    assert op is not None
    assert (op.kind, list(op.arguments)) == ("matrix_transpose", ["input"])
    graph = Graph()
    w = graph.placeholder("w")
    packet = {"T": aten.numpy_T, "mT": aten.mT, "H": aten.matrix_H, "mH": aten.mH}[name]
    for node in (graph.call_function(getattr, (w, name)), graph.call_function(packet, (w,))):
        op = canonical(node)
        assert op is not None
        assert (op.kind, op["input"]) == ("matrix_transpose", w)


@pytest.mark.parametrize("name", ["H", "mH"])
def test_a_conjugate_transpose_is_no_transpose(name: str) -> None:
    product = result_of(view_of(lambda w: getattr(w, name) * 2, torch.randn(5, 3, dtype=torch.complex64)))
    assert is_weight_transpose(canonical(product.all_input_nodes[0])) is False
