"""Blocks as public code writes them, none of them from the zoo: what is found, and in evaluation eager's own results.

Counted by hand: Linear → activation → Linear, gated blocks, and norms that read a sum or a dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.backend import FuseBackend
from tests.capture import capture
from tests.precision import assert_as_exact_as_eager

WIDTH = 32
WITHOUT_DENSE = FuseBackend(["gated_dense", "dense_act_dense", "dropout_norm"], strict=True)  # that asks the machine


class Block(nn.Module):
    """A residual block of a function of x and of the layers that its constructor makes."""

    def __init__(self, make: Callable[[], dict[str, Any]], forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        for name, value in make().items():
            setattr(self, name, value)
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def stack(make: Callable[[], dict[str, Any]], forward: Callable[[Any, Tensor], Tensor], *ends: nn.Module) -> nn.Module:
    return nn.Sequential(Block(make, forward), Block(make, forward), *ends)


def layers(hidden: int = 64, **more: Any) -> dict[str, Any]:
    made = {"norm": nn.LayerNorm(WIDTH), "first": nn.Linear(WIDTH, hidden), "second": nn.Linear(64, WIDTH)}
    return {**made, "drop": nn.Dropout(0.1), **more}


def weights() -> dict[str, Any]:
    return {
        "norm": nn.LayerNorm(WIDTH),
        "w1": nn.Parameter(torch.randn(WIDTH, 64)),
        "b1": nn.Parameter(torch.randn(64)),
        "w2": nn.Parameter(torch.randn(64, WIDTH)),
        "b2": nn.Parameter(torch.randn(WIDTH)),
    }


def in_place(m: Any, x: Tensor) -> Tensor:
    """`relu_`, dropout in place, `+=`."""
    h = F.dropout(m.first(m.norm(x)).relu_(), 0.1, m.training, inplace=True)
    h = F.dropout(m.second(h), 0.1, m.training, inplace=True)
    h += x
    return h


def bias_outside(m: Any, x: Tensor) -> Tensor:
    """Megatron: fused bias and GELU, fused bias and dropout."""
    y = m.b1 + F.linear(m.norm(x), m.w1.t())
    y = y * 0.5 * (1.0 + torch.tanh(0.79788456 * y * (1 + 0.044715 * y * y)))
    return x + F.dropout(F.linear(y, m.w2.t()) + m.b2.expand_as(x), p=0.1, training=m.training)


def einsum(m: Any, x: Tensor) -> Tensor:
    h = torch.einsum("bnd,dh->bnh", x, m.w1) + m.b1
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return m.norm(x + F.dropout(torch.einsum("bnh,hd->bnd", h, m.w2) + m.b2, 0.1, m.training))


def gated_second(m: Any, x: Tensor) -> Tensor:
    value, gate = m.first(m.norm(x)).chunk(2, dim=-1)
    return x + m.drop(m.second(m.drop(value * F.gelu(gate))))


def half_steps(m: Any, x: Tensor) -> Tensor:
    """A Conformer's feed-forward modules."""
    h = m.first(m.norm(x))
    return x + 0.5 * m.drop(m.second(m.drop(h * h.sigmoid())))


def parallel(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.drop(m.attention(y)) + m.drop(m.second(F.gelu(m.first(y), approximate="tanh"))) + x


def in_sequence(m: Any, x: Tensor) -> Tensor:
    """fairseq's post-norm layer, sequence first."""
    x = m.norm(x + F.dropout(m.attention(x, x, x, need_weights=False)[0], 0.1, m.training))
    return m.last(x + m.drop(m.second(m.drop(F.relu(m.first(x))))))


def over_tokens(m: Any, x: Tensor) -> Tensor:
    """MLP-Mixer with 1×1 convolutions over tokens."""
    x = x + m.mix(m.norm(x))
    return x + m.drop(m.second(F.gelu(m.first(m.last(x)))))


def sandwich(m: Any, x: Tensor) -> Tensor:
    return x + m.last(m.drop(m.second(F.gelu(m.first(m.norm(x))))))


def scaled_stream(m: Any, x: Tensor) -> Tensor:
    """DeepNet."""
    return m.norm(x * 0.81 + m.drop(m.second(F.gelu(m.first(x)))))


def last() -> nn.Module:
    return nn.LayerNorm(WIDTH)


def tokens() -> nn.Module:
    return nn.Sequential(nn.Conv1d(40, 80, 1), nn.GELU(), nn.Dropout(0.1), nn.Conv1d(80, 40, 1), nn.Dropout(0.1))


# name → (model, what is found)
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "in place": (lambda: stack(layers, in_place, last()), {"dense_act_dense": 2, "dropout_norm": 2}),
    "bias outside": (lambda: stack(weights, bias_outside, last()), {"dense_act_dense": 2, "dropout_norm": 2}),
    "einsum": (lambda: stack(weights, einsum), {"dense_act_dense": 2, "dropout_norm": 2}),
    "gated": (lambda: stack(lambda: layers(128), gated_second, last()), {"gated_dense": 2, "dropout_norm": 2}),
    "half steps": (lambda: stack(layers, half_steps, last()), {"dense_act_dense": 2, "dropout_norm": 2}),
    "parallel": (
        lambda: stack(lambda: layers(attention=nn.Linear(WIDTH, WIDTH)), parallel, last()),
        {"dense_act_dense": 2, "dropout_norm": 2},
    ),
    "in sequence": (
        lambda: stack(lambda: layers(attention=nn.MultiheadAttention(WIDTH, 4), last=last()), in_sequence),
        {"dense_act_dense": 2, "dropout_norm": 4},
    ),
    "over tokens": (
        lambda: stack(lambda: layers(mix=tokens(), last=last()), over_tokens, last()),
        {"dense_act_dense": 4, "dropout_norm": 4},
    ),
    "sandwich": (
        lambda: stack(lambda: layers(last=last()), sandwich, last()),
        {"dense_act_dense": 2, "dropout_norm": 4},
    ),
    "scaled stream": (lambda: stack(layers, scaled_stream), {"dense_act_dense": 2, "dropout_norm": 2}),
    "coordinates": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 64), nn.Softplus(100), nn.Linear(64, 3)),
        {"dense_act_dense": 2},
    ),
}  # fmt: skip


def results(call: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> list[Tensor]:
    """The output and every gradient."""
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *model.parameters()])]


@pytest.mark.parametrize(("make", "counts"), MODELS.values(), ids=MODELS)
def test_in_the_wild(make: Callable[[], nn.Module], counts: dict[str, int]) -> None:
    model, x = make(), torch.randn(2, 40, WIDTH)
    assert capture(model.train(), x, backend=WITHOUT_DENSE, fullgraph=True).report.counts() == counts
    model.eval()
    ours = results(lambda x: capture(model, x, backend=WITHOUT_DENSE).output, x.requires_grad_(), model)
    eager = results(model, x, model)
    exact = results(model.double(), x.detach().double().requires_grad_(), model)
    for i, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_as_exact_as_eager(mine, theirs, truth, f"result {i}", through_a_model=True)
    with torch.no_grad():
        assert capture(model.float(), x.detach(), backend=WITHOUT_DENSE, fullgraph=True).report.counts() == counts
