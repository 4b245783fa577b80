"""T5 (Raffel et al., arXiv:1910.10683): a pre-norm encoder-decoder with RMSNorm, ReLU and relative position biases.

Where the patterns are:
    dense_act_dense: the feed-forward network of each encoder and decoder layer: ReLU, dropout, no biases.
    dropout_norm: the residual sums, two per encoder layer and three per decoder layer, go into the next RMSNorm; the
        dropout of the embeddings goes into the first one, once in the encoder and once in the decoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Attention, PreNormBlock, feed_forward, random_tokens


@dataclass(frozen=True)
class T5Config:
    vocab: int = 101
    dim: int = 32
    head_dim: int = 6
    heads: int = 4
    hidden: int = 80
    layers: int = 2
    buckets: int = 8
    max_distance: int = 16
    dropout: float = 0.1
    eps: float = 1e-6

    @classmethod
    def base(cls) -> T5Config:
        return cls(vocab=32128, dim=768, head_dim=64, heads=12, hidden=3072, layers=12, buckets=32, max_distance=128)


CONFIG = T5Config()
EXPECTED = {
    "train": {"dense_act_dense": 4, "dropout_norm": 12},
    "eval": {"dense_act_dense": 4, "dropout_norm": 12},
}


def distance_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of a distance ≥ 0: one each for the first half of the buckets, then wider and wider ones."""
    single = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / single) / math.log(max_distance / single) * (buckets - single)
    return torch.where(distance < single, distance, (single + far.long()).clamp(max=buckets - 1))


class RelativePositionBias(nn.Module):
    """What each head adds to the score of a key by its distance from the query; shared by the layers of a stack."""

    def __init__(self, config: T5Config, *, causal: bool) -> None:
        super().__init__()
        self.causal, self.buckets, self.max_distance = causal, config.buckets, config.max_distance
        self.biases = nn.Embedding(config.buckets, config.heads)

    def forward(self, time: int) -> Tensor:
        """Biases `[1, heads, time, time]`, -inf at the keys that a causal query may not read."""
        positions = torch.arange(time, device=self.biases.weight.device)
        ahead = positions[None, :] - positions[:, None]
        if self.causal:
            bucket = distance_buckets((-ahead).clamp(min=0), self.buckets, self.max_distance)
        else:  # one half of the buckets looks back, the other ahead
            half = self.buckets // 2
            bucket = distance_buckets(ahead.abs(), half, self.max_distance) + half * (ahead > 0)
        bias = self.biases(bucket).permute(2, 0, 1)[None]
        return bias.masked_fill(ahead > 0, -torch.inf) if self.causal else bias


class Stack(nn.Module):
    """The encoder, or the decoder, which is causal and reads the encoder's output."""

    def __init__(self, config: T5Config, *, decoder: bool) -> None:
        super().__init__()
        # T5 folds the scale of the scores into the initialisation of the query projection.
        attention = partial(
            Attention,
            config.dim,
            config.heads,
            head_dim=config.head_dim,
            bias=False,
            scale=1.0,
            dropout=config.dropout,
        )
        norm = partial(nn.RMSNorm, config.dim, eps=config.eps)
        self.position_bias = RelativePositionBias(config, causal=decoder)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                attention(),
                feed_forward(config.dim, config.hidden, nn.ReLU(), dropout=config.dropout, bias=False),
                norm,
                config.dropout,
                attention() if decoder else None,
            )
            for _ in range(config.layers)
        )
        self.norm = norm()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `[batch, time, dim]`, context `[batch, context_time, dim]` → like x."""
        bias = self.position_bias(x.shape[1])
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, bias, context)
        return self.dropout(self.norm(x))


class T5(nn.Module):
    """Scores the next target token at every position; input and output embeddings are one."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """source `[batch, source_time]`, target `[batch, target_time]` → `[batch, target_time, vocab]`."""
        encoded = self.encoder(self.tokens(source))
        decoded = self.decoder(self.tokens(target), encoded)
        return F.linear(decoded * decoded.shape[-1] ** -0.5, self.tokens.weight)


def build(config: T5Config = CONFIG) -> nn.Module:
    return T5(config)


def example_inputs(config: T5Config = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    source = random_tokens(config.vocab, batch, 17, seed=seed)
    return source, random_tokens(config.vocab, batch, 11, seed=seed + 1)
