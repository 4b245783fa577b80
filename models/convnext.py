"""ConvNeXt (Liu et al., arXiv:2201.03545): depthwise convolution, LayerNorm and a feed-forward network, channels last.

Where the patterns are:
    dense_act_dense: the feed-forward network of each block.
    dropout_norm: nowhere. A residual sum reaches a LayerNorm only between stages, and permuted; what is dropped are
        whole branches (stochastic depth, arXiv:1603.09382), not elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.layers import feed_forward, random_features


@dataclass(frozen=True)
class ConvNextConfig:
    image: int = 32
    channels: int = 3
    depths: tuple[int, ...] = (1, 2)
    dims: tuple[int, ...] = (24, 40)
    classes: int = 10
    drop_path: float = 0.25
    layer_scale: float = 0.5  # published: 1e-6, which would hide the blocks of an untrained model from every comparison
    eps: float = 1e-6

    @classmethod
    def tiny(cls) -> ConvNextConfig:
        return cls(
            image=224,
            depths=(3, 3, 9, 3),
            dims=(96, 192, 384, 768),
            classes=1000,
            drop_path=0.1,
            layer_scale=1e-6,
        )


CONFIG = ConvNextConfig()
EXPECTED = {"train": {"dense_act_dense": 3}, "eval": {"dense_act_dense": 3}}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[batch, channels, height, width]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StochasticDepth(nn.Module):
    """Drops a branch `[batch, ...]` as a whole, per sample, and scales the others by `1 / (1 - p)`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)


class Block(nn.Module):
    """`x + drop(scale * feed_forward(norm(depthwise(x))))`."""

    def __init__(self, dim: int, drop_path: float, config: ConvNextConfig) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=config.eps)
        self.feed_forward = feed_forward(dim, 4 * dim, nn.GELU())
        self.scale = nn.Parameter(config.layer_scale * torch.ones(dim))
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x `[batch, dim, height, width]` → like x."""
        branch = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        branch = (self.scale * self.feed_forward(branch)).permute(0, 3, 1, 2)
        return x + self.drop_path(branch)


class ConvNext(nn.Module):
    """Classifies images by the mean over positions."""

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__()
        first, last = config.dims[0], config.dims[-1]
        # The deeper a block, the more often it is dropped.
        rates = iter(torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist())
        layers: list[nn.Module] = [
            nn.Conv2d(config.channels, first, kernel_size=4, stride=4),
            ChannelNorm(first, eps=config.eps),
        ]
        for stage, (depth, dim) in enumerate(zip(config.depths, config.dims, strict=True)):
            if stage > 0:
                before = config.dims[stage - 1]
                layers += [ChannelNorm(before, eps=config.eps), nn.Conv2d(before, dim, kernel_size=2, stride=2)]
            layers += [Block(dim, next(rates), config) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(last, eps=config.eps)
        self.head = nn.Linear(last, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """images `[batch, channels, image, image]` → `[batch, classes]`."""
        return self.head(self.norm(self.features(images).mean(dim=(2, 3))))


def build(config: ConvNextConfig = CONFIG) -> nn.Module:
    return ConvNext(config)


def example_inputs(config: ConvNextConfig = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    return (random_features(batch, config.channels, config.image, config.image, seed=seed),)
