"""The small modules that `bench` measures, and one step of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class DropoutAddNorm(nn.Module):
    """`LayerNorm(residual + dropout(x))`."""

    def __init__(self, dim: int, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(residual + self.dropout(x))  # type: ignore[no-any-return]


def mlp(dim: int, hidden: int, p: float) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(p), nn.Linear(hidden, dim))


class Block(nn.Module):
    """A post-norm transformer block, as in BERT."""

    def __init__(self, dim: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.attention_norm = DropoutAddNorm(dim, p)
        self.mlp = mlp(dim, 4 * dim, 0.0)
        self.mlp_norm = DropoutAddNorm(dim, p)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.attention_norm(self.project(attended), x)
        return self.mlp_norm(self.mlp(x), x)  # type: ignore[no-any-return]


def step(model: Any, inputs: list[Tensor], *, train: bool) -> Callable[[], object]:
    """Forward and backward, or forward alone; called once, so that it is compiled."""

    def infer() -> object:
        with torch.no_grad():
            return model(*inputs)

    def train_step() -> None:
        for tensor in (*inputs, *model.parameters()):
            tensor.grad = None
        y = model(*inputs)
        y.backward(torch.ones_like(y))

    run = train_step if train else infer
    run()
    return run
