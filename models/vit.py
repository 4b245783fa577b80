"""Vision Transformer (Dosovitskiy et al., arXiv:2010.11929): a pre-norm encoder over image patches and a class token.

Where the patterns are:
    dense_act_dense: the feed-forward network of each layer, with a dropout behind the GELU.
    dropout_norm: as in GPT-2: two residual sums per layer, and the dropout of the embeddings before the first norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.layers import Attention, PatchEmbedding, PreNormBlock, feed_forward, random_features


@dataclass(frozen=True)
class ViTConfig:
    image: int = 24
    patch: int = 6
    channels: int = 3
    dim: int = 32
    hidden: int = 80
    heads: int = 4
    layers: int = 2
    classes: int = 10
    dropout: float = 0.1
    eps: float = 1e-6

    @classmethod
    def base_16(cls) -> ViTConfig:
        return cls(image=224, patch=16, dim=768, hidden=3072, heads=12, layers=12, classes=1000)


CONFIG = ViTConfig()
EXPECTED = {
    "train": {"dense_act_dense": 2, "dropout_norm": 5},
    "eval": {"dense_act_dense": 2, "dropout_norm": 5},
}


class ViT(nn.Module):
    """Classifies images by the class token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patches = PatchEmbedding(config.channels, config.patch, config.dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (config.image // config.patch) ** 2 + 1, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        norm = partial(nn.LayerNorm, config.dim, eps=config.eps)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                Attention(config.dim, config.heads, dropout=config.dropout),
                feed_forward(config.dim, config.hidden, nn.GELU(), dropout=config.dropout),
                norm,
                config.dropout,
            )
            for _ in range(config.layers)
        )
        self.norm = norm()
        self.head = nn.Linear(config.dim, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """images `[batch, channels, image, image]` → `[batch, classes]`."""
        patches = self.patches(images)
        x = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        x = self.dropout(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def build(config: ViTConfig = CONFIG) -> nn.Module:
    return ViT(config)


def example_inputs(config: ViTConfig = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    return (random_features(batch, config.channels, config.image, config.image, seed=seed),)
