"""The whole way through Inductor, in the situations in which people train and serve."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fuse_pass
from fuse_pass import fuse_backend
from tests.precision import assert_as_exact_as_eager

DIM, HIDDEN = 24, 56


class Block(nn.Module):
    """Both patterns, post-norm."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM), nn.LayerNorm(DIM)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


BOTH = {"dense_act_dense": 1, "dropout_norm": 1}


def run(model: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of `model`, which wraps `module`."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(weights)
    named = {"x": x, **dict(module.named_parameters())}
    return {"y": y.detach(), **{name: t.grad.clone() for name, t in named.items() if t.grad is not None}}


def check(
    change: Callable[[Block], object] = lambda block: None,
    shape: tuple[int, ...] = (6, DIM),
    dtype: torch.dtype = torch.float32,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    call: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda block: block,
    needs_input_grad: bool = True,
    **compile_options: Any,
) -> dict[str, Tensor]:
    """Compiles the block and compares output and gradients with eager; returns ours."""
    block = Block()
    change(block)
    block = block.to(dtype)
    x = torch.randn(shape).to(dtype).requires_grad_(needs_input_grad)
    wide, narrow = copy.deepcopy(block).double(), copy.deepcopy(block)
    exact = run(wide, wide, x.double())
    with context():
        eager = run(narrow, narrow, x)
        compiled = torch.compile(call(block), backend=fuse_backend, fullgraph=True, **compile_options)
        with fuse_pass.collect() as report:
            ours = run(compiled, block, x)
    assert report.counts() == BOTH
    assert ours.keys() == eager.keys() == exact.keys()
    for name, value in exact.items():
        assert_as_exact_as_eager(ours[name], eager[name], value, name, through_a_model=True)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    assert check(dtype=dtype)["y"].dtype is dtype


@pytest.mark.parametrize("shape", [(DIM,), (2, 3, DIM), (2, 2, 3, DIM), (0, DIM)])
def test_ranks(shape: tuple[int, ...]) -> None:
    assert check(shape=shape)["y"].shape == shape


def test_autocast() -> None:
    ours = check(context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert ours["up.weight"].dtype is torch.float32


def test_frozen_parameters() -> None:
    ours = check(lambda block: (block.up.requires_grad_(False), block.norm.bias.requires_grad_(False)))
    assert sorted(ours) == ["down.bias", "down.weight", "norm.weight", "x", "y"]


def test_first_layer_has_no_input_gradient() -> None:
    assert "x" not in check(needs_input_grad=False)


def test_activation_checkpointing() -> None:
    check(call=lambda block: lambda x: checkpoint(block, x, use_reentrant=False))


def test_checkpointing_recomputes_the_same_mask() -> None:
    """The seed is drawn once and kept, so the recomputed forward drops the same elements."""
    block = Block(0.5).double()
    x = torch.randn(6, DIM, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)

    def gradient(function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        compiled = torch.compile(function, backend=fuse_backend, fullgraph=True)
        compiled(x)
        torch.manual_seed(2)
        return run(compiled, block, x)

    plain, checkpointed = gradient(block), gradient(call)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference(context: Callable[[], AbstractContextManager[Any]]) -> None:
    block, x = Block(0.3).eval(), torch.randn(6, DIM)
    state = torch.get_rng_state()
    with context(), fuse_pass.collect() as report:
        y = torch.compile(block, backend=fuse_backend, fullgraph=True)(x)
        torch.testing.assert_close(y, block(x))
    assert report.counts() == BOTH
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws no random numbers"


def test_dynamic_batch() -> None:
    block = Block()
    compiled = torch.compile(block, backend=fuse_backend, dynamic=True, fullgraph=True)
    run(compiled, block, torch.randn(3, DIM, requires_grad=True))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (5, 8):
            x = torch.randn(batch, DIM, requires_grad=True)
            ours = run(compiled, block, x)
            torch.testing.assert_close(ours, run(block, block, x), rtol=1e-4, atol=1e-5)


def kept(compiled: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    return compiled(torch.ones(shape)) != 0


class DropNorm(nn.Module):
    """Two dropouts before norms; the sums are returned, so that the masks can be seen."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first = F.dropout(x, self.p, self.training)
        second = F.dropout(x, self.p, self.training)
        return first, second, F.layer_norm(first, (x.shape[-1],)), F.layer_norm(second, (x.shape[-1],))


def test_masks_differ_between_layers_and_calls_and_follow_the_seed() -> None:
    compiled = torch.compile(DropNorm(0.5), backend=fuse_backend, fullgraph=True)
    x = torch.ones(256, 64)

    def masks(seed: int | None) -> tuple[Tensor, Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        first, second, _, _ = compiled(x)
        return first != 0, second != 0

    with fuse_pass.collect() as report:
        a, b = masks(0)
    assert report.counts() == {"dropout_norm": 2}
    c, d = masks(None)
    again = masks(0)
    assert torch.equal(again[0], a)
    assert torch.equal(again[1], b)
    for mask in (a, b, c, d):
        assert abs(mask.double().mean().item() - 0.5) < 5 * 0.5 / 128
    for other in (b, c, d):  # independent masks agree in half of all places
        assert abs((a == other).double().mean().item() - 0.5) < 5 * 0.5 / 128


def test_p_1_gives_exact_zeros() -> None:
    compiled = torch.compile(DropNorm(1.0), backend=fuse_backend, fullgraph=True)
    for value in compiled(torch.full((4, 8), torch.inf)):
        assert torch.equal(value, torch.zeros(4, 8))


def test_gradient_uses_the_mask_of_the_forward_pass() -> None:
    model = DropNorm(0.5)
    x = torch.randn(32, 16, requires_grad=True)
    first, second, _, _ = torch.compile(model, backend=fuse_backend, fullgraph=True)(x)
    (first.sum() + 3 * second.sum()).backward()
    torch.testing.assert_close(x.grad, 2.0 * (first != 0) + 6.0 * (second != 0))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_follows_eager(optimizer: type[torch.optim.Optimizer]) -> None:
    """Ten steps with p = 0 end where eager ends."""
    start = Block()
    batches = [torch.randn(16, DIM)] * 10

    def train(block: nn.Module, model: Callable[[Tensor], Tensor]) -> list[float]:
        steps = optimizer(block.parameters(), lr=1e-2)
        losses = []
        for x in batches:
            loss = F.mse_loss(model(x), x.flip(-1))
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses.append(loss.item())
        return losses

    eager, ours = copy.deepcopy(start), copy.deepcopy(start)
    expected = train(eager, eager)
    losses = train(ours, torch.compile(ours, backend=fuse_backend))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
