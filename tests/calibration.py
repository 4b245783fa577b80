"""A network, data and a module with every awkward layer, for the tests of static and of learned scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def data(rows: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.endswith(("_scale", "_zero_point"))}


class Wired(nn.Module):
    """A layer of every kind whose sites serve several tensors, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.lstm = nn.LSTM(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        y: Tensor = self.lstm(self.attention(x, x, x)[0])[0]
        return y
