"""Whisper (Radford et al., arXiv:2212.04356): two convolutions on log-mel features, then a pre-norm encoder-decoder.

One difference: the keys have a bias here, which the softmax ignores.

Where the patterns are:
    dense_act_dense: the feed-forward network of each encoder and decoder layer. The GELUs of the front end stand
        between convolutions of width three.
    dropout_norm: two residual sums per encoder layer and three per decoder layer go into the next norm (dropout is 0
        in the published models); so does features + positions in the encoder and tokens + positions in the decoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Attention, PreNormBlock, feed_forward, random_features, random_tokens


@dataclass(frozen=True)
class WhisperConfig:
    mels: int = 10
    frames: int = 34  # the encoder sees half as many
    vocab: int = 101
    positions: int = 19
    dim: int = 32
    heads: int = 4
    layers: int = 2
    dropout: float = 0.0

    @classmethod
    def small(cls) -> WhisperConfig:
        return cls(mels=80, frames=3000, vocab=51865, positions=448, dim=768, heads=12, layers=12)


CONFIG = WhisperConfig()
EXPECTED = {
    "train": {"dense_act_dense": 4, "dropout_norm": 12},
    "eval": {"dense_act_dense": 4, "dropout_norm": 12},
}


def sinusoids(time: int, dim: int) -> Tensor:
    """Fixed positions `[time, dim]`: sines of wavelengths 2π … 20000π in the first half, cosines in the second."""
    frequency = torch.exp(-math.log(10000) / (dim // 2 - 1) * torch.arange(dim // 2))
    angle = torch.arange(time)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def blocks(config: WhisperConfig, *, decoder: bool) -> nn.ModuleList:
    """The layers of the encoder, or those of the decoder, which are causal and read the encoder's output."""
    attention = partial(Attention, config.dim, config.heads, dropout=config.dropout)
    return nn.ModuleList(
        PreNormBlock(
            attention(causal=decoder),
            feed_forward(config.dim, 4 * config.dim, nn.GELU()),
            partial(nn.LayerNorm, config.dim),
            config.dropout,
            attention() if decoder else None,
        )
        for _ in range(config.layers)
    )


class Encoder(nn.Module):
    """Reads log-mel features."""

    positions: Tensor

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.mels, config.dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.dim, config.dim, kernel_size=3, stride=2, padding=1)
        self.register_buffer("positions", sinusoids(config.frames // 2, config.dim), persistent=False)
        self.blocks = blocks(config, decoder=False)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, features: Tensor) -> Tensor:
        """features `[batch, mels, frames]` → `[batch, frames // 2, dim]`."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(features)))).transpose(1, 2)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """Scores the next token at every position; the output weights are those of the token embedding."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Parameter(0.02 * torch.randn(config.positions, config.dim))
        self.blocks = blocks(config, decoder=True)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """tokens `[batch, time]`, context `[batch, context_time, dim]` → `[batch, time, vocab]`."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, context=context)
        return F.linear(self.norm(x), self.tokens.weight)


class Whisper(nn.Module):
    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """features `[batch, mels, frames]`, tokens `[batch, time]` → `[batch, time, vocab]`."""
        return self.decoder(tokens, self.encoder(features))


def build(config: WhisperConfig = CONFIG) -> nn.Module:
    return Whisper(config)


def example_inputs(config: WhisperConfig = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    features = random_features(batch, config.mels, config.frames, seed=seed)
    return features, random_tokens(config.vocab, batch, config.positions - 6, seed=seed)
