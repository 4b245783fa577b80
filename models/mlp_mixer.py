"""MLP-Mixer (Tolstikhin et al., arXiv:2105.01601): image patches mixed by one MLP over patches and one over channels.

Where the patterns are:
    dense_act_dense: twice per layer; the MLP over patches works on the transposed activations.
    dropout_norm: no dropout, but the two residual sums of each layer go into the next LayerNorm, the last into the
        final one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from models.layers import PatchEmbedding, feed_forward, random_features


@dataclass(frozen=True)
class MixerConfig:
    image: int = 24
    patch: int = 6
    channels: int = 3
    dim: int = 32
    patch_hidden: int = 40
    channel_hidden: int = 80
    layers: int = 2
    classes: int = 10
    eps: float = 1e-6

    @classmethod
    def base_16(cls) -> MixerConfig:
        return cls(image=224, patch=16, dim=768, patch_hidden=384, channel_hidden=3072, layers=12, classes=1000)


CONFIG = MixerConfig()
EXPECTED = {
    "train": {"dense_act_dense": 4, "dropout_norm": 4},
    "eval": {"dense_act_dense": 4, "dropout_norm": 4},
}


class MixerBlock(nn.Module):
    """Mixes patches, then channels, each behind a norm and beside a residual."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.patch_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.mix_patches = feed_forward((config.image // config.patch) ** 2, config.patch_hidden, nn.GELU())
        self.channel_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.mix_channels = feed_forward(config.dim, config.channel_hidden, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """x `[batch, patches, dim]` → like x."""
        x = x + self.mix_patches(self.patch_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix_channels(self.channel_norm(x))


class Mixer(nn.Module):
    """Classifies images by the mean over patches."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.patches = PatchEmbedding(config.channels, config.patch, config.dim)
        self.blocks = nn.ModuleList(MixerBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.head = nn.Linear(config.dim, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """images `[batch, channels, image, image]` → `[batch, classes]`."""
        x = self.patches(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def build(config: MixerConfig = CONFIG) -> nn.Module:
    return Mixer(config)


def example_inputs(config: MixerConfig = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    return (random_features(batch, config.channels, config.image, config.image, seed=seed),)
