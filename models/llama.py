"""LLaMA (Touvron et al., arXiv:2302.13971): a decoder with RMSNorm, rotary positions and SwiGLU.

Query heads may share keys and values as in LLaMA 2 (arXiv:2307.09288).

Where the patterns are:
    dense_act_dense: nowhere; SwiGLU multiplies the activation by a third Linear (arXiv:2002.05202).
    dropout_norm: no dropout, but the two residual sums of each layer go into the next RMSNorm, the last into the
        final one. The first norm reads the embedding itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import merge_heads, random_tokens, split_heads


@dataclass(frozen=True)
class LlamaConfig:
    vocab: int = 101
    dim: int = 32
    hidden: int = 84
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    theta: float = 10000.0
    eps: float = 1e-6

    @classmethod
    def llama_7b(cls) -> LlamaConfig:
        return cls(vocab=32000, dim=4096, hidden=11008, heads=32, kv_heads=32, layers=32)


CONFIG = LlamaConfig()
EXPECTED = {
    "train": {"gated_dense": 2, "dropout_norm": 4},
    "eval": {"gated_dense": 2, "dropout_norm": 4},
}


def rotate(x: Tensor, theta: float) -> Tensor:
    """Turns each pair (i, i + head_dim / 2) of `[batch, heads, time, head_dim]` by `time * theta^(-2i / head_dim)`."""
    head_dim = x.shape[-1]
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=x.device, dtype=x.dtype) / head_dim)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None] * frequency
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class RotaryAttention(nn.Module):
    """Causal attention with rotated queries and keys; several query heads may share one key and value head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.theta = config.heads, config.kv_heads, config.theta
        kv_dim = config.dim // config.heads * config.kv_heads
        self.query = nn.Linear(config.dim, config.dim, bias=False)
        self.key = nn.Linear(config.dim, kv_dim, bias=False)
        self.value = nn.Linear(config.dim, kv_dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[batch, time, dim]` → like x."""
        query = rotate(split_heads(self.query(x), self.heads), self.theta)
        key = rotate(split_heads(self.key(x), self.kv_heads), self.theta)
        value = split_heads(self.value(x), self.kv_heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.output(merge_heads(attended))


class SwiGLU(nn.Module):
    """`(silu(x Wgᵀ) * x Wuᵀ) Wdᵀ` on `[..., dim]`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and beside a residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.eps)
        self.attention = RotaryAttention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.eps)
        self.feed_forward = SwiGLU(config.dim, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x `[batch, time, dim]` → like x."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """Scores the next token at every position."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.eps)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens `[batch, time]` → `[batch, time, vocab]`."""
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(config: LlamaConfig = CONFIG) -> nn.Module:
    return Llama(config)


def example_inputs(config: LlamaConfig = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    return (random_tokens(config.vocab, batch, 17, seed=seed),)
