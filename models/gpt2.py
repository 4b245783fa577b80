"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners", no arXiv number): a decoder.

The pre-norm block is described in arXiv:1904.10509.

Where the patterns are:
    dense_act_dense: the feed-forward network of each layer, with GELU by tanh.
    dropout_norm: the two residual sums of each layer go into the next norm (the last into the final norm) and on
        along the residual stream; so does the dropout of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Attention, PreNormBlock, feed_forward, random_tokens


@dataclass(frozen=True)
class GPT2Config:
    vocab: int = 101
    positions: int = 19
    dim: int = 32
    heads: int = 4
    layers: int = 2
    dropout: float = 0.1

    @classmethod
    def small(cls) -> GPT2Config:
        return cls(vocab=50257, positions=1024, dim=768, heads=12, layers=12)


CONFIG = GPT2Config()
EXPECTED = {
    "train": {"dense_act_dense": 2, "dropout_norm": 5},
    "eval": {"dense_act_dense": 2, "dropout_norm": 5},
}


class GPT2(nn.Module):
    """Scores the next token at every position; the output weights are those of the token embedding."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Embedding(config.positions, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                Attention(config.dim, config.heads, causal=True, dropout=config.dropout),
                feed_forward(config.dim, 4 * config.dim, nn.GELU(approximate="tanh")),
                partial(nn.LayerNorm, config.dim),
                config.dropout,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens `[batch, time]` → `[batch, time, vocab]`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def build(config: GPT2Config = CONFIG) -> nn.Module:
    return GPT2(config)


def example_inputs(config: GPT2Config = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    return (random_tokens(config.vocab, batch, config.positions - 2, seed=seed),)
