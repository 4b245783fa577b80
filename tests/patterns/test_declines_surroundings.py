"""Declines because of what surrounds a match: autocast, grad mode, random numbers, torch.func, higher-order ops."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fuse_pass.backend import FuseBackend
from fuse_pass.inductor import compiler
from fuse_pass.patterns import spellings
from fuse_pass.report import Reason, collect
from tests.capture import capture
from tests.patterns.truth import assert_blames, assert_declines, assert_fused_like_eager, leaves

dense_inputs = spellings.dense_act_dense.CORPUS.example_inputs
norm_inputs = spellings.dropout_norm.CORPUS.example_inputs

GELU = F.gelu


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(GELU(F.linear(x, w1, b1)), w2, b2)


def mlp_with_dropout(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.dropout(GELU(F.linear(x, w1, b1)), 0.25), w2, b2)


def add_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x + r, (24,), w, b)


def dropout_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(F.dropout(x, 0.25) + r, (24,), w, b)


# --- autocast and grad mode


def test_dense_autocast_begins_inside() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.linear(x, w1, b1)
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(GELU(h), w2, b2)

    assert_declines(function, dense_inputs(), Reason.AUTOCAST, "_enter_autocast")


def test_dense_autocast_is_switched_off_inside() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = F.linear(x, w1, b1)
            with torch.autocast("cpu", enabled=False):
                a = GELU(h)
            return F.linear(a, w2, b2)

    assert_declines(function, {k: v.detach().float() for k, v in dense_inputs().items()}, Reason.AUTOCAST, "_e")


def test_norm_autocast_begins_inside() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = x + r
        with torch.autocast("cpu", torch.bfloat16):
            return F.layer_norm(z, (24,), w, b)

    assert_declines(function, norm_inputs(), Reason.AUTOCAST, "_enter_autocast")


def test_dense_no_grad_block_inside() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        with torch.no_grad():
            h = F.linear(x, w1, b1)
        return F.linear(GELU(h), w2, b2)

    assert_declines(function, dense_inputs(), Reason.GRAD_MODE, "_set_grad_enabled")


def test_dense_inference_mode_begins_inside() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.linear(x, w1, b1)
        with torch.inference_mode():
            y = F.linear(GELU(h), w2, b2)
        return y.clone()

    assert_declines(function, dense_inputs(), Reason.GRAD_MODE, "_enter_inference_mode")


@pytest.mark.parametrize("switch", [torch.set_grad_enabled, torch._C._set_grad_enabled])
def test_norm_grad_mode_is_switched_inside(switch: Any) -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = x + r
        switch(False)
        y = F.layer_norm(z, (24,), w, b)
        switch(True)
        return y + x

    assert_declines(function, norm_inputs(), Reason.GRAD_MODE, "_set_grad_enabled")


# --- random numbers


@pytest.mark.parametrize(
    ("function", "inputs"), [(mlp_with_dropout, dense_inputs), (dropout_norm, norm_inputs)], ids=["dense", "norm"]
)
def test_eager_s_random_numbers_are_wanted(function: Any, inputs: Any) -> None:
    arguments = leaves(inputs())
    torch.manual_seed(3)
    found = capture(function, *arguments, own_random_numbers=False)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.FALLBACK_RANDOM, "")
    torch.manual_seed(3)
    assert torch.equal(found.output, function(*arguments))


@pytest.mark.parametrize(("function", "inputs"), [(mlp, dense_inputs), (add_norm, norm_inputs)], ids=["dense", "norm"])
def test_eager_s_random_numbers_do_not_matter_without_dropout(function: Any, inputs: Any) -> None:
    found = assert_fused_like_eager(function, inputs(), own_random_numbers=False)
    assert len(found.report.matches) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "inputs"), [(mlp_with_dropout, dense_inputs), (dropout_norm, norm_inputs)], ids=["dense", "norm"]
)
def test_fallback_random_of_inductor_is_obeyed(function: Any, inputs: Any) -> None:
    arguments = leaves(inputs())
    with torch._inductor.config.patch(fallback_random=True), collect() as report:
        assert compiler.draws_stock_random_numbers({})
        torch.manual_seed(3)
        ours = torch.compile(function, backend=FuseBackend(strict=True))(*arguments)
    assert report.counts() == {}
    assert_blames(report, Reason.FALLBACK_RANDOM, "")
    torch.manual_seed(3)
    torch.testing.assert_close(ours, function(*arguments))


# --- torch.func and higher-order ops


def test_dense_inside_vmap() -> None:
    inputs = {k: v.detach() for k, v in dense_inputs().items()}
    x, *weights = inputs.values()
    found = capture(lambda x, *w: torch.vmap(lambda row: mlp(row, *w))(x), x, *weights)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.FUNCTORCH, "")
    torch.testing.assert_close(found.output, mlp(x, *weights))


@pytest.mark.parametrize(("function", "inputs"), [(mlp, dense_inputs), (add_norm, norm_inputs)], ids=["dense", "norm"])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_inside_a_torch_func_transform(function: Any, inputs: Any, transform: Any) -> None:
    x, *rest = (a.detach() for a in inputs().values())

    def differentiated(x: Tensor, *rest: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            y = function(x, *rest)
            return (y * y).sum() if transform is torch.func.grad else y

        return transform(inner)(x)  # type: ignore[no-any-return]

    rest = [rest[0][0], *rest[1:]] if function is add_norm and transform is torch.func.vmap else rest
    found = capture(differentiated, x, *rest)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.FUNCTORCH, "")
    assert torch.equal(found.output, differentiated(x, *rest))


def test_dense_before_and_after_a_transform_fuses() -> None:
    def function(x: Tensor, *w: Tensor) -> Tensor:
        y = mlp(x, *w)
        z = torch.func.vmap(torch.sin)(y)
        return F.linear(torch.relu(F.linear(z, w[2].T)), w[2])

    assert_fused_like_eager(function, dense_inputs(), counts={"dense_act_dense": 2})


def test_a_transform_does_not_disturb_a_sum_after_it() -> None:
    """In a torch.func transform there are wrappers around tensors, which have no memory of their own."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        slope = torch.func.grad(lambda t: add_norm(t, t.sin(), w, b).square().sum())(x)
        return add_norm(slope, r, w, b)

    inputs = leaves(norm_inputs())
    found = capture(function, *inputs, dynamic=True)
    assert found.report.counts() == {"dropout_norm": 1}
    torch.testing.assert_close(found.output, function(*inputs))


def test_a_sum_that_a_transform_writes_into_is_left_alone() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = x + r
        y = F.layer_norm(z, (24,), w, b)
        torch.func.vmap(lambda row: row.mul_(2))(z.detach())
        return y

    inputs = leaves(norm_inputs())
    found = capture(function, *inputs)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.MUTATION, "")


@pytest.mark.parametrize(("function", "inputs"), [(mlp, dense_inputs), (add_norm, norm_inputs)], ids=["dense", "norm"])
def test_inside_a_selective_checkpoint(function: Any, inputs: Any) -> None:
    """The user's policy names PyTorch's ops; a fused one would slip through it."""
    asked = set()

    def policy(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        asked.add(op)
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(*arguments: Tensor) -> Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]

    arguments = leaves(inputs())
    found = capture(checkpointed, *arguments)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.HIGHER_ORDER, "")
    assert all("tag_activation_checkpoint" in decline.detail for decline in found.report.declines)
    torch.testing.assert_close(found.output, function(*arguments))
    assert asked


@pytest.mark.parametrize(("function", "inputs"), [(mlp, dense_inputs), (add_norm, norm_inputs)], ids=["dense", "norm"])
def test_inside_a_branch(function: Any, inputs: Any) -> None:
    arguments = [a.detach() for a in inputs().values()]

    def branching(*arguments: Tensor) -> Tensor:
        return torch.cond(arguments[0].sum() > 0, function, lambda *a: function(*a) * 2, arguments)  # type: ignore[no-any-return]

    found = capture(branching, *arguments)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.HIGHER_ORDER, "")
    assert all("cond" in decline.detail for decline in found.report.declines)
    assert torch.equal(found.output, branching(*arguments))
