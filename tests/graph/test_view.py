"""What the matcher reads in a graph: Linear layers, walks, ownership of memory, and what must not be crossed."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fuse_pass.graph.shapes import value_of
from fuse_pass.graph.view import GraphView, Linear, barrier
from fuse_pass.report import Reason
from tests.graph.dynamo import result_of, view_of

X, W, B = torch.randn(3, 5, 8), torch.randn(24, 8), torch.randn(24)


def linear_of(function: Any, *arguments: Any) -> Linear | None:
    view = view_of(function, *(arguments or (X, W, B)))
    return view.linears.get(result_of(view))


LINEARS: list[tuple[bool, bool, int, Any]] = [
    # has bias, transposed, nodes
    (True, False, 1, lambda x, w, b: F.linear(x, w, b)),
    (False, False, 1, lambda x, w, b: F.linear(x, w)),
    (False, False, 1, lambda x, w, b: x @ w.T),
    (False, False, 1, lambda x, w, b: torch.matmul(x, w.mT)),
    (False, True, 1, lambda x, w, b: x @ w.T.contiguous()),
    (True, False, 2, lambda x, w, b: x @ w.t() + b),
    (True, False, 2, lambda x, w, b: b + x @ w.transpose(1, 0)),
    (True, False, 2, lambda x, w, b: F.linear(x, w).add_(b)),
    (True, False, 1, lambda x, w, b: torch.addmm(b, x.view(15, 8), w.t())),
]


@pytest.mark.parametrize(("bias", "transposed", "nodes", "function"), LINEARS)
def test_linears(bias: bool, transposed: bool, nodes: int, function: Any) -> None:
    layer = linear_of(function)
    assert layer is not None
    assert (layer.bias is not None) == bias
    assert layer.transposed is transposed
    assert len(layer.nodes) == nodes
    if not transposed:
        assert layer.weight.name == "l_w_"


def iadd_into_the_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    b = b.clone()
    b += x[0, 0] @ w.T
    return b


NO_LINEARS: dict[str, Any] = {
    "scaled addmm": lambda x, w, b: torch.addmm(b, x[0], w.t(), alpha=2),
    "product of two batches": lambda x, w, b: x @ x.mT,
    "scalar bias": lambda x, w, b: (x @ w.T).add(1.0),
    "bias per row": lambda x, w, b: x[0] @ w.T + b[:5, None],
    "bias that broadcasts": lambda x, w, b: x @ w.T + b[:1],
    "bias with a factor": lambda x, w, b: torch.add(x @ w.T, b, alpha=2),
    "sum of two products": lambda x, w, b: x @ w.T + x @ w.T,
    "product added into the bias": iadd_into_the_bias,
    "matrix times vector": lambda x, w, b: w @ x[0, 0],
    "elementwise": lambda x, w, b: x * 2,
}


@pytest.mark.parametrize("function", NO_LINEARS.values(), ids=NO_LINEARS)
def test_no_linears(function: Any) -> None:
    assert linear_of(function) is None


def test_a_product_that_is_read_again_keeps_its_bias_outside() -> None:
    view = view_of(lambda x, w, b: (lambda p: (p + b) * p)(x @ w.T), X, W, B)
    (layer,) = view.linears.values()
    assert layer.bias is None


# --- walking


def test_walk_passes_views_casts_and_inactive_dropout() -> None:
    view = view_of(lambda x: F.dropout(torch.sin(x).view(15, 8).double(), 0.5, False).unflatten(0, (3, 5)), X)
    walk = view.walk_up(result_of(view))
    assert walk.node.target is torch.sin
    assert len(walk.passed) == 4
    assert [cast.target for cast in walk.casts] == ["double"]
    assert walk.moves_rows is None


@pytest.mark.parametrize(
    ("function", "target"),
    [
        (lambda x: F.dropout(torch.sin(x), 0.5), F.dropout),
        (lambda x: torch.sin(x).transpose(0, 1), "transpose"),
        (lambda x: torch.sin(x) * 2, None),
        (lambda x: (lambda s: F.dropout(s, 0.5, False, True) * s)(torch.sin(x)).view(-1), None),
    ],
    ids=["active dropout", "transpose", "arithmetic", "shared in-place dropout"],
)
def test_walk_stops(function: Any, target: Any) -> None:
    view = view_of(function, X)
    walk = view.walk_up(result_of(view))
    assert walk.node.target is not torch.sin
    assert target is None or walk.node.target is target or walk.node.target == target


def test_walk_notes_what_breaks_rows() -> None:
    view = view_of(lambda x: torch.sin(x).view(3, 5, 2, 4).view(3, 5, 8), X)
    walk = view.walk_up(result_of(view))
    assert walk.node.target is torch.sin
    assert walk.moves_rows is not None


# --- ownership

OWNED: dict[str, Any] = {
    "fresh": lambda x, y: (x * 2).add_(1),
    "view of a fresh value": lambda x, y: (x * 2).view(-1).add_(1),
    "transpose of a fresh value": lambda x, y: (x * 2).mT.add_(1),
    "after another in-place operation": lambda x, y: (x * 2).mul_(3).add_(1),
    "product": lambda x, y: (x @ y).add_(1),
    "active dropout": lambda x, y: F.dropout(x, 0.5).add_(1),
    "embedding": lambda x, y: F.embedding(torch.zeros(3, dtype=torch.int64), y).add_(1),
    "cat": lambda x, y: torch.cat([x]).add_(1),
    "op of ours": lambda x, y: torch.ops.fuse_pass.dense.default(x, y, None).add_(1),
    "first result of an op of ours": lambda x, y: torch.ops.fuse_pass.dropout_norm.default(
        x, x, None, None, None, 0.0, 1e-5, 1, "layer_norm", None, False
    )[0].add_(1),
}
SHARED: dict[str, Any] = {
    "input": lambda x, y: x.add_(1),
    "view of an input": lambda x, y: x.view(-1).add_(1),
    "slice of an input": lambda x, y: x[0].add_(1),
    "contiguous input": lambda x, y: x.contiguous().add_(1),
    "cast to the same dtype": lambda x, y: x.to(torch.float32).add_(1),
    "inactive dropout of an input": lambda x, y: F.dropout(x, 0.5, False).add_(1),
    "what an op of ours keeps": lambda x, y: torch.ops.fuse_pass.dropout_norm.default(
        x, x, None, None, None, 0.0, 1e-5, 1, "layer_norm", None, False
    )[1].add_(1),
    "unknown operation": lambda x, y: torch.atleast_3d(x).add_(1),
    "fresh but read again": lambda x, y: (lambda z: (z.add_(1), z * 2)[0])(x * 2),
    "view of what is read again": lambda x, y: (lambda z: (z.view(-1).add_(1), z * 2)[0])(x * 2),
}


def owns(function: Any) -> bool:
    view = view_of(function, X.clone(), torch.randn(8, 8))
    (node,) = (node for node in view.nodes if node.target == "add_")
    op = view.op(node)
    assert op is not None
    assert op.in_place
    return view.owns_its_input(op)


@pytest.mark.parametrize("function", OWNED.values(), ids=OWNED)
def test_owned_memory(function: Any) -> None:
    assert owns(function)


@pytest.mark.parametrize("function", SHARED.values(), ids=SHARED)
def test_shared_memory(function: Any) -> None:
    assert not owns(function)


def test_a_dropout_whose_p_is_known_at_run_time_may_return_its_input() -> None:
    view = view_of(lambda x, p: F.dropout(x, p).add_(1), X.clone(), 0.3, dynamic=True)
    (node,) = (node for node in view.nodes if node.target == "add_")
    op = view.op(node)
    assert op is not None
    dropout = view.op(op["input"])
    assert dropout is not None
    assert view.owns_its_input(op) is isinstance(dropout["p"], float)


def test_an_in_place_sum_writes_into_its_first_operand_alone() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x += y
        return x * y

    view = view_of(function, X.clone(), X.clone())
    x, y = (value_of(node) for node in view.graph.find_nodes(op="placeholder"))
    assert x is not None
    assert y is not None
    write = view.last_write(x)
    assert write is not None
    assert write.target is operator.iadd
    assert view.last_write(y) is None


# --- barriers


def barriers(function: Any, *arguments: Any) -> set[Reason]:
    view = view_of(function, *arguments)
    return {reason for node in view.nodes if (reason := barrier(node)) is not None}


def in_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x.mT


def in_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x * 2


BARRIERS: dict[str, tuple[Reason | None, Any]] = {
    "pure": (None, lambda x: torch.sin(x).view(-1) + x.view(-1).max()),
    "bitwise": (None, lambda x: ((x > 0) & (x < 1)) | (x > 2)),
    "random": (None, lambda x: F.dropout(x) + torch.rand_like(x)),
    "batch norm in evaluation": (None, lambda x: F.batch_norm(x, None, None, training=True)),
    "embedding": (None, lambda x: F.embedding(torch.tensor([0, 1]), x[0])),
    "method": (Reason.MUTATION, lambda x: (x * 1).clamp_(0)),
    "function": (Reason.MUTATION, lambda x: torch.sigmoid_(x * 1)),
    "operator": (Reason.MUTATION, lambda x: (x * 1).__ior__(1) if x.dtype is torch.int else (x * 1).__imul__(2)),
    "option": (Reason.MUTATION, lambda x: F.hardswish(x * 1, inplace=True)),
    "positional option": (Reason.MUTATION, lambda x: F.relu6(x * 1, True)),
    "aten": (Reason.MUTATION, lambda x: torch.ops.aten.mul_.Tensor(x * 1, 2)),
    "out": (Reason.MUTATION, lambda x: torch.sin(x, out=x * 1)),
    "max_norm": (Reason.MUTATION, lambda x: F.embedding(torch.tensor([0, 1]), x[0] * 1, max_norm=1.0)),
    "running mean": (Reason.MUTATION, lambda x: F.batch_norm(x, x[0, :, 0] * 1, x[0, :, 1] ** 2, training=True)),
    "branch": (Reason.MUTATION, lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))),
    "autocast": (Reason.AUTOCAST, in_autocast),
    "no_grad": (Reason.GRAD_MODE, in_no_grad),
    "inference_mode": (Reason.GRAD_MODE, in_inference_mode),
}


@pytest.mark.parametrize(("reason", "function"), BARRIERS.values(), ids=BARRIERS)
def test_barriers(reason: Reason | None, function: Any) -> None:
    assert barriers(function, X.clone()) == (set() if reason is None else {reason})


def test_barriers_between_are_strictly_between() -> None:
    view = view_of(lambda x: (x * 1).add_(1) * 2, X)
    first, write, last = (node for node in view.nodes if node.op in ("call_function", "call_method"))
    assert list(view.barriers_between(first, last)) == [(write, Reason.MUTATION)]
    assert list(view.barriers_between(write, last)) == []
    assert list(view.barriers_between(first, write)) == []


def test_autocast_regions_nest() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        a = torch.sin(x)
        with torch.autocast("cpu", torch.bfloat16):
            b = torch.cos(x)
            with torch.autocast("cpu", enabled=False):
                c = torch.tan(x)
            d = torch.exp(x)
        return a, b, c, d, torch.log(x)

    view = view_of(function, X.abs())
    depth = {node.target: len(view.autocast_stack(node)) for node in view.nodes}
    assert [depth[f] for f in (torch.sin, torch.cos, torch.tan, torch.exp, torch.log)] == [0, 1, 2, 1, 0]


def test_functorch_regions_end() -> None:
    view = view_of(lambda x: torch.cos(torch.func.vmap(torch.sin)(x)), X)
    inside = {node.target: view.is_in_functorch(node) for node in view.nodes}
    assert inside[torch.sin]
    assert not inside[torch.cos]


def test_what_is_no_node_has_no_kind() -> None:
    view = view_of(lambda x: x * 2, X)
    assert isinstance(view, GraphView)
    assert view.kind(2) is None
    assert view.kind(None) is None
    assert view.kind(result_of(view)) == "mul"
    assert isinstance(result_of(view), Node)
