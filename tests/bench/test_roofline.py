"""Work and limits of a step, against sums done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fuse_pass.bench import roofline
from fuse_pass.bench.contenders import Step
from fuse_pass.bench.models import DropoutAddNorm, mlp
from fuse_pass.bench.rows import Row
from fuse_pass.commands.named_models import Example


def step_of(model: nn.Module, *inputs: torch.Tensor, train: bool, passes: int | None = None) -> Step:
    example = Example(model, inputs)
    return Step(model, example, Row("row", lambda: example, train, passes=passes))


def test_products_of_two_linears() -> None:
    forward = 2 * 5 * 7 * 11 + 2 * 5 * 11 * 7
    assert roofline.flop(step_of(mlp(7, 11), torch.randn(5, 7), train=False)) == forward
    x = torch.randn(5, 7, requires_grad=True)
    assert roofline.flop(step_of(mlp(7, 11), x, train=True)) == 3 * forward, "and both gradients of each"


def test_products_of_attention_are_counted() -> None:
    class Attend(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q)

    assert roofline.flop(step_of(Attend(), torch.randn(2, 3, 5, 8), train=False)) == 2 * (2 * 2 * 3 * 5 * 5 * 8)


def test_least_bytes() -> None:
    parameters = 4 * (7 * 11 + 11 + 11 * 7 + 7)
    x = torch.randn(5, 7, requires_grad=True)
    assert roofline.least_bytes(step_of(mlp(7, 11), x, train=False)) == parameters + 2 * x.nbytes
    trained = roofline.least_bytes(step_of(mlp(7, 11), x, train=True))
    assert trained == 2 * (parameters + 2 * x.nbytes) + parameters + x.nbytes
    rows = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]
    assert roofline.least_bytes(step_of(DropoutAddNorm(6, 0.1), *rows, train=True, passes=8)) == 8 * 4 * 6 * 4


def test_limit_is_the_slower_of_products_and_memory() -> None:
    step = step_of(mlp(32, 64), torch.randn(16, 32), train=False)
    by_products = roofline.limit(step, rate=1.0, device="cpu")
    assert by_products == roofline.Limit(roofline.flop(step), roofline.PRODUCTS)
    by_memory = roofline.limit(step, rate=1e30, device="cpu")
    assert by_memory.by == roofline.MEMORY
    assert 0 < by_memory.seconds < 1


def test_rates_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SHAPES", ((64, 96, 128),))
    rates = roofline.product_rates([torch.float32, torch.float32], "cpu")
    assert list(rates) == [torch.float32]
    assert 1e8 < rates[torch.float32] < 1e14
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert 1e7 < roofline.product_rates([dtype], "cpu")[dtype] < 1e14
    assert 1e7 < roofline.copy_rate(1 << 20, "cpu") < 1e13
    assert roofline.copy_rate(0, "cpu") > 0


def test_slow_half_types_are_measured_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float16 product takes minutes on a CPU without the instructions for it."""
    monkeypatch.setattr(roofline.compat, "has_fast_cpu_dtype", lambda dtype: False)
    assert roofline._multiplied_as(torch.float16, "cpu") is torch.float32
    assert roofline._multiplied_as(torch.float16, "cuda") is torch.float16
    assert roofline._multiplied_as(torch.float64, "cpu") is torch.float64


def test_steps_without_any_product_have_a_limit() -> None:
    step = step_of(nn.ReLU(), torch.randn(3, 4), train=False)
    assert roofline.flop(step) == 0
    assert roofline.limit(step, 1e9, "cpu").by == roofline.MEMORY


@pytest.mark.parametrize("train", [False, True])
def test_counting_leaves_the_step_as_it_was(train: bool) -> None:
    x = torch.randn(5, 7, requires_grad=train)
    step = step_of(mlp(7, 11), x, train=train)
    before = [parameter.clone() for parameter in step.example.model.parameters()]
    roofline.limit(step, 1e9, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, step.example.model.parameters(), strict=True))
