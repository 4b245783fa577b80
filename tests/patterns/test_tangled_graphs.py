"""Graphs in which values are shared, tied, written to or laid out oddly: whatever fuses, the result stays eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.backend import FuseBackend
from fuse_pass.patterns import spellings
from tests.patterns.truth import assert_agrees, assert_fused_like_eager, leaves, with_grads

dense_inputs = spellings.dense_act_dense.CORPUS.example_inputs
norm_inputs = spellings.dropout_norm.CORPUS.example_inputs

LINEAR, GELU = F.linear, F.gelu


def norm(z: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(z, (24,), weight, bias)


def chain_read_in_the_middle(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    y = LINEAR(GELU(LINEAR(x, w1, b1)), w2, b2)
    return LINEAR(torch.relu(y), w1[:, :1] @ w2[:, :1].T) + y.sum()


# matches, function
DENSE: dict[str, tuple[int, Any]] = {
    "chain of three": (3, lambda x, w1, b1, w2, b2: LINEAR(
        F.silu(LINEAR(torch.relu(LINEAR(GELU(LINEAR(x, w1, b1)), w2, b2)), w2.T, b1)), w2, b2)),
    "chain through an in-place ReLU": (2, lambda x, w1, b1, w2, b2: LINEAR(
        LINEAR(GELU(LINEAR(x, w1, b1)), w2, b2).relu_(), w2.T)),
    "chain read in the middle": (2, chain_read_in_the_middle),
    "tied weights": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x, w1, b1)), w1.t())),
    "one weight for both": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x, w1[:8])), w1[:8])),
    "one MLP twice": (2, lambda x, w1, b1, w2, b2: sum(  # type: ignore[dict-item]
        LINEAR(GELU(LINEAR(t, w1, b1)), w2, b2) for t in (x, x + 1))),
    "bias from the other bias": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x, w1, b1)), w2, b1[:16])),
    "weight from the input": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x, w1, b1)), x[0] @ w1.t())),
    "input as its own weight": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x[0], x[0])), x[0].t())),
    "bias added twice": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x, w1, b1)), w2, b2) + b2),
    "swapped batch dimensions": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x.transpose(0, 1), w1, b1)), w2)),
    "expanded input": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x[:, :1].expand(3, 7, 8), w1, b1)), w2, b2)),
    "strided input": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x[:, ::2], w1, b1)), w2, b2)),
    "strided weights": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x, w1[::2], b1[::2])), w2[:, ::2], b2)),
    "no hidden features": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x, w1[:0], b1[:0])), w2[:, :0], b2)),
    "no output features": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x, w1, b1)), w2[:0], b2[:0])),
    "frozen first layer": (1, lambda x, w1, b1, w2, b2: LINEAR(
        GELU(LINEAR(x.detach(), w1.detach(), b1.detach())), w2, b2)),
    "frozen second layer": (1, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x, w1, b1)), w2.detach(), b2.detach())),
    "everything frozen": (1, lambda x, w1, b1, w2, b2: LINEAR(
        GELU(LINEAR(x.detach(), w1.detach())), w2.detach()) * x.sum()),
    "detached in the middle": (0, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x, w1, b1).detach()), w2, b2)),
    "dropout after dropout": (0, lambda x, w1, b1, w2, b2: LINEAR(
        F.dropout(F.dropout(GELU(LINEAR(x, w1, b1)), 1.0), 1.0), w2, b2)),
    "gated": (0, lambda x, w1, b1, w2, b2: LINEAR(GELU(LINEAR(x, w1, b1)) * LINEAR(x, w1 * 2), w2, b2)),
    "two readers of one activation": (0, lambda x, w1, b1, w2, b2: (
        lambda a: LINEAR(a, w2, b2) * LINEAR(a, w2 * 2))(GELU(LINEAR(x, w1, b1)))),
    "two activations of one layer": (0, lambda x, w1, b1, w2, b2: (
        lambda h: LINEAR(GELU(h), w2) * LINEAR(torch.relu(h), w2))(LINEAR(x, w1, b1))),
    "rows swapped in the middle": (0, lambda x, w1, b1, w2, b2: LINEAR(
        GELU(LINEAR(x, w1, b1)).transpose(0, 1).reshape(3, 5, 24), w2, b2)),
}  # fmt: skip


@pytest.mark.parametrize(("matches", "function"), DENSE.values(), ids=DENSE)
def test_dense(matches: int, function: Any) -> None:
    found = assert_fused_like_eager(function, dense_inputs())
    assert found.report.counts()["dense_act_dense"] == matches, str(found.report)


def norm_of_the_sum_after_another_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
    """The second match provides what the first one, placed earlier, reads."""
    z = x + r
    s = torch.tanh(x) + z
    return norm(s, w), norm(z, w, b)


def norm_of_the_sum_after_another_norm_all_read(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
    z = x + r
    s = torch.tanh(x) + z
    return norm(s, w), norm(z, w, b), s * 2, z * 2


def pre_norm_stack(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    for _ in range(3):
        r = r + F.dropout(torch.tanh(norm(r, w, b)), 1.0)
    return norm(r, w, b)


# matches, function
NORM: dict[str, tuple[int, Any]] = {
    "norm of a sum after another norm": (2, norm_of_the_sum_after_another_norm),
    "norm of a sum after another norm, all read": (2, norm_of_the_sum_after_another_norm_all_read),
    "pre-norm stack": (3, pre_norm_stack),
    "post-norm stack": (2, lambda x, r, w, b: norm(norm(x + r, w, b) + r, w, b)),
    "sum of a value with itself": (1, lambda x, r, w, b: norm(x + x, w, b)),
    "dropout of its own residual": (1, lambda x, r, w, b: norm(F.dropout(x, 0.25) + x, w, b)),
    "view of its own residual": (1, lambda x, r, w, b: norm(x.view(3, 5, 24) + x, w, b)),
    "shared dropout": (1, lambda x, r, w, b: (lambda d: norm(d + r, w, b) * (d + 1))(F.dropout(x, 1.0))),
    "dropout after dropout": (1, lambda x, r, w, b: norm(F.dropout(torch.tanh(x), 0.25) + r, w, b)),
    "weight is the residual": (1, lambda x, r, w, b: norm(x + w, w, b)),
    "weight is the bias": (1, lambda x, r, w, b: norm(x + r, w, w)),
    "swapped dimensions": (1, lambda x, r, w, b: norm(x.transpose(0, 1) + r.transpose(0, 1), w, b)),
    "operands laid out differently": (1, lambda x, r, w, b: norm(x.mT.contiguous().mT + r, w, b)),
    "operands laid out differently, sum read": (1, lambda x, r, w, b: (
        lambda z: (norm(z, w, b), z * 2))(r + x.mT.contiguous().mT)),
    "expanded operands": (1, lambda x, r, w, b: norm(x[:1].expand(3, 5, 24) + r[:, :1].expand(3, 5, 24), w, b)),
    "scalar residual": (1, lambda x, r, w, b: norm(x + r[0, 0, 0], w, b)),
    "number as residual": (0, lambda x, r, w, b: norm(x + 2.0, w, b)),
    "difference": (0, lambda x, r, w, b: norm(x - r, w, b)),
    "only the weight is trained": (1, lambda x, r, w, b: norm(x.detach() + r.detach(), w, b)),
    "only the residual is trained": (1, lambda x, r, w, b: norm(x.detach() + r, w.detach())),
}  # fmt: skip


@pytest.mark.parametrize(("matches", "function"), NORM.values(), ids=NORM)
def test_norm(matches: int, function: Any) -> None:
    found = assert_fused_like_eager(function, norm_inputs())
    assert found.report.counts()["dropout_norm"] == matches, str(found.report)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norm_cast_that_is_read_again(name: str) -> None:
    """The sum is the second output; the cast is made again for its other readers."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = (x + r).float()
        return getattr(F, name)(z, (24,)) + z

    assert_fused_like_eager(function, norm_inputs(dtype=torch.bfloat16), counts={"dropout_norm": 1})


def sum_written_later(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
    z = x + r
    y = norm(z, w, b)
    alias = z.view(-1)
    alias *= 2
    return y, z


def residual_written_later(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
    r = r.clone()
    z = x + r
    y = norm(z, w, b)
    r.add_(1)
    return y, z, r


def alias_of_an_inactive_dropout_is_written(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
    x = x.clone()
    d = F.dropout(x, 0.5, False)
    alias = d.view(-1)
    alias += 1
    return norm(d + r, w, b), x


def inactive_dropout_is_written_later(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
    x = x.clone()
    d = F.dropout(x, 0.5, False)
    y = norm(d, w, b)
    d.add_(1)
    return y, x


def result_written_later(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
    y = norm(x + r, w, b)
    y[0] = 0
    return y, x * 1


WRITTEN = [
    sum_written_later, residual_written_later, alias_of_an_inactive_dropout_is_written,
    inactive_dropout_is_written_later, result_written_later,
]  # fmt: skip


@pytest.mark.parametrize("function", WRITTEN)
def test_writes_outside_the_match(function: Any) -> None:
    with torch.no_grad():
        assert_fused_like_eager(function, norm_inputs(), counts={"dropout_norm": 1})


def layer_written_between_two_of_a_chain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    y = LINEAR(GELU(LINEAR(x, w1, b1)), w2, b2)
    copy = y * 1
    y.mul_(2)
    return LINEAR(torch.relu(y), w2.T) + copy.sum()


def input_written_before_and_after(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Any:
    x = x.clone().mul_(2)
    y = LINEAR(GELU(LINEAR(x, w1, b1)), w2, b2)
    return y, x.add_(1)


@pytest.mark.parametrize(
    ("matches", "function"), [(2, layer_written_between_two_of_a_chain), (1, input_written_before_and_after)]
)
def test_writes_around_linears(matches: int, function: Any) -> None:
    with torch.no_grad():
        assert_fused_like_eager(function, dense_inputs(), counts={"dense_act_dense": matches})


@pytest.mark.slow
def test_a_trained_result_is_written_to_through_inductor() -> None:
    """The op's result is a view where it runs without AOTAutograd, so that only a compiled graph can write into it."""

    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        y = LINEAR(GELU(LINEAR(x, w1, b1)), w2, b2)
        y[0] = 0
        return y

    compiled = torch.compile(function, backend=FuseBackend(strict=True))
    inputs = dense_inputs()
    ours, of_eager = with_grads(compiled, leaves(inputs)), with_grads(function, leaves(inputs))
    assert_agrees(ours, of_eager, with_grads(function, leaves(inputs, torch.float64)))


@pytest.mark.parametrize("requires_grad", ["x", "weight1", "bias1", "weight2", "bias2"])
def test_only_one_argument_is_trained(requires_grad: str) -> None:
    inputs = {name: value.detach().requires_grad_(name == requires_grad) for name, value in dense_inputs().items()}

    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return LINEAR(GELU(LINEAR(x, w1, b1)), w2, b2)

    assert_fused_like_eager(function, inputs, counts={"dense_act_dense": 1})


def test_both_patterns_in_one_block() -> None:
    inputs = {**dense_inputs(), "w": torch.randn(8), "b": torch.randn(8), "w3": torch.randn(8, 16)}

    def block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w: Tensor, b: Tensor, w3: Tensor) -> Tensor:
        y = LINEAR(GELU(LINEAR(x, w1, b1)), w2, b2) @ w3.T
        return F.layer_norm(x + F.dropout(y, 0.25), (8,), w, b)

    assert_fused_like_eager(block, inputs, counts={"dense_act_dense": 1, "dropout_norm": 1})
