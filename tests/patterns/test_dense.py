"""Every other Linear: replaced where it pays and only there, after all other patterns, with all dtype rules kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.backend import FuseBackend
from fuse_pass.gemm import measured
from fuse_pass.gemm.problem import GemmProblem
from fuse_pass.gemm.product import pays
from fuse_pass.graph.view import GraphView
from fuse_pass.ops.dense import Dense
from fuse_pass.patterns import dense, spellings
from fuse_pass.patterns.pattern import Candidate, tensor
from fuse_pass.report import Reason
from tests.capture import Captured, capture, costs, everything_pays, nothing_pays
from tests.patterns.truth import assert_declines, assert_fused_like_eager

example_inputs = spellings.dense.CORPUS.example_inputs

ops = torch.ops.fuse_pass


@pytest.fixture(autouse=True)
def every_linear_pays(costs_of_no_machine: None) -> Iterator[None]:
    with costs(everything_pays):
        yield


def targets(found: Captured) -> list[Any]:
    return [node.target for gm in found.rewritten for node in gm.graph.nodes if node.op.startswith("call")]


def in_inference(function: Callable[..., Tensor], **options: Any) -> Captured:
    inputs = {name: value.detach() for name, value in example_inputs(rows=(2, 3)).items()}
    return assert_fused_like_eager(function, inputs, **options)


# --- what is replaced -------------------------------------------------------------------------------------------------


def test_it_takes_what_other_patterns_leave() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
            self.mlp = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x + F.dropout(self.query(x), 0.1))
            return self.head(x + self.mlp(x))  # type: ignore[no-any-return]

    found = capture(Block(), torch.randn(4, 8))
    assert found.report.counts() == {"dense_act_dense": 1, "dropout_norm": 1, "dense": 2}
    assert {match.variant for match in found.report.matches if match.pattern == "dense"} == {"8 → 8", "8 → 3"}
    assert {match.where for match in found.report.matches if match.pattern == "dense"} == {"query", "head"}
    assert capture(Block(), torch.randn(4, 8), backend=FuseBackend(["dense"])).report.counts() == {"dense": 4}


def test_what_does_not_pay_is_neither_replaced_nor_reported() -> None:
    with costs(nothing_pays):
        found = capture(nn.Linear(8, 24), torch.randn(4, 8))
    assert found.rewritten[0] is found.originals[0]
    assert (found.report.matches, found.report.declines) == ([], [])


def test_the_question_is_asked_with_the_sizes_and_dtype_of_the_product() -> None:
    asked: list[Any] = []
    layer, cpu = nn.Linear(8, 24), torch.device("cpu")
    with costs(lambda problem: bool(asked.append((problem.device, problem.dtype, problem.sizes)))):
        capture(layer, torch.randn(2, 5, 8))
        capture(layer, torch.randn(8))
        with torch.autocast("cpu", torch.bfloat16):
            capture(layer, torch.randn(2, 8))
        capture(lambda x, w: x @ w, torch.randn(3, 8), torch.randn(8, 7))
    assert asked == [
        (cpu, torch.float32, (10, 24, 8)),
        (cpu, torch.float32, (1, 24, 8)),
        (cpu, torch.bfloat16, (2, 24, 8)),
        (cpu, torch.float32, (3, 7, 8)),
    ]


def test_small_thin_and_foreign_products_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "table", lambda: {"float32": 1 << 22})
    cpu, cuda, large = torch.device("cpu"), torch.device("cuda"), (512, 768, 768)
    assert pays(GemmProblem(cpu, torch.float32, large))
    assert not pays(GemmProblem(cpu, torch.float32, large, activation="gelu")), "the table has no verdict on it"
    assert not pays(GemmProblem(cpu, torch.float32, (2, 24, 8)))
    assert not pays(GemmProblem(cpu, torch.float32, (10_000, 2, 768)))
    assert not pays(GemmProblem(cpu, torch.float64, large))
    assert not pays(GemmProblem(cpu, torch.bfloat16, large))
    assert not pays(GemmProblem(cuda, torch.float32, large))
    monkeypatch.setattr(measured, "table", lambda: {"float32": 1 << 22, "float32+activation": 1 << 22})
    assert pays(GemmProblem(cpu, torch.float32, large, activation="gelu"))
    assert not pays(GemmProblem(cpu, torch.float32, large, activation="mish")), "the library has none"


def test_the_table_decides_in_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.Linear(128, 4)), torch.randn(300, 128)
    for table, count in (({"float32": 1 << 22}, 1), ({"float32": 1 << 40}, 0), ({}, 0)):
        monkeypatch.setattr(measured, "table", lambda table=table: table)
        with costs(pays):
            assert capture(model, x).report.counts()["dense"] == count, table


# --- with an activation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [F.gelu, F.silu, F.relu, lambda y: F.gelu(y, approximate="tanh")])
def test_in_inference_the_activation_is_part_of_it(act: Callable[[Tensor], Tensor]) -> None:
    found = in_inference(lambda x, w, b: act(F.linear(x, w, b)), counts={"dense": 1})
    assert targets(found) == [ops.dense_act.default]


def test_in_training_the_activation_stays_outside() -> None:
    found = assert_fused_like_eager(lambda x, w, b: F.gelu(F.linear(x, w, b)), example_inputs(), counts={"dense": 1})
    assert ops.dense.default in targets(found)
    assert ops.dense_act.default not in targets(found)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: (lambda y: F.relu(y) + y)(F.linear(x, w, b)),
        lambda x, w, b: F.relu(F.linear(x, w, b).view(3, 2, -1)),
        lambda x, w, b: F.relu(F.linear(x, w, b).double()),
        lambda x, w, b: torch.sinh(F.linear(x, w, b)),
    ],
    ids=["second reader", "view between", "cast between", "unknown"],
)
def test_an_activation_that_is_not_alone_stays_outside(function: Callable[..., Tensor]) -> None:
    found = in_inference(function, counts={"dense": 1})
    assert ops.dense.default in targets(found)
    assert ops.dense_act.default not in targets(found)


def test_an_activation_that_does_not_pay_stays_outside() -> None:
    with costs(lambda problem: not problem.activation):
        found = in_inference(lambda x, w, b: F.relu(F.linear(x, w, b)), counts={"dense": 1})
    assert ops.dense.default in targets(found)


# --- dtypes, layouts, declines ----------------------------------------------------------------------------------------


def test_a_bias_that_promotes_stays_outside() -> None:
    inputs = example_inputs(rows=(2, 3))
    inputs["bias"] = inputs["bias"].detach().double().requires_grad_()
    found = assert_fused_like_eager(lambda x, w, b: x @ w.t() + b, inputs, counts={})
    assert found.report.declines == []


@pytest.mark.parametrize("layout", ["row-major", "column-major"])
def test_the_gradient_is_laid_out_like_the_weight(layout: str) -> None:
    inputs = example_inputs()
    weight = inputs["weight"].detach().t().contiguous().requires_grad_()
    spelling = {"row-major": lambda x, w: x @ w, "column-major": lambda x, w: F.linear(x, w.t())}[layout]
    found = capture(spelling, inputs["x"], weight)
    assert found.report.counts() == {"dense": 1}
    (grad,) = torch.autograd.grad(found.output.sum(), weight)
    assert grad.is_contiguous()


def test_a_result_that_is_not_contiguous_is_declined() -> None:
    node = torch.fx.Graph().placeholder("y")
    call = Dense(tensor(node), tensor(node), None)
    candidate = Candidate(anchor=node, nodes=frozenset((node,)), outputs=(node,), call=call, variant="")
    node.meta["example_value"] = torch.empty(3, 4)
    assert dense.check(GraphView(node.graph), candidate) is None
    node.meta["example_value"] = torch.empty(4, 3).t()
    problem = dense.check(GraphView(node.graph), candidate)
    assert problem is not None
    assert problem.reason is Reason.LAYOUT


def test_declines_are_reported_where_it_would_pay() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.vmap(lambda row: F.linear(row, w, b))(x)

    assert_declines(function, example_inputs(rows=(2, 3)), Reason.FUNCTORCH, "batched_outputs")


def test_one_linear_of_a_tensor_nested_on_the_way() -> None:
    """A size of its rows compares with no number."""
    x, w = torch.randn(6, 8), torch.randn(16, 8)

    def function(x: Tensor, w: Tensor) -> Tensor:
        rows = torch.nested.nested_tensor_from_jagged(x, torch.arange(0, 7, 2))
        return F.linear(rows, w).values()  # type: ignore[no-any-return]

    with costs(pays):
        found = capture(function, x, w)
    assert found.report.counts() == {}
    assert torch.equal(found.output, F.linear(x, w))
