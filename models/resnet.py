"""ResNet with bottlenecks (He et al., arXiv:1512.03385; the stride in the 3×3 convolution, as usual since).

Where the patterns are: nowhere. Convolutions and BatchNorm, and one Linear at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import random_features


@dataclass(frozen=True)
class ResNetConfig:
    image: int = 32
    channels: int = 3
    stem: int = 12
    depths: tuple[int, ...] = (1, 2)
    widths: tuple[int, ...] = (8, 14)
    classes: int = 10

    @classmethod
    def resnet50(cls) -> ResNetConfig:
        return cls(image=224, stem=64, depths=(3, 4, 6, 3), widths=(64, 128, 256, 512), classes=1000)


CONFIG = ResNetConfig()
EXPECTED: dict[str, dict[str, int]] = {"train": {}, "eval": {}}

_EXPANSION = 4  # of a bottleneck's output over its width


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm; `[batch, inputs, h, w]` → `[batch, outputs, h / stride, w / stride]`."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution beside a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * width
        self.reduce = convolution(inputs, width, 1)
        self.spatial = convolution(width, width, 3, stride)
        self.expand = convolution(width, outputs, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x `[batch, inputs, h, w]` → `[batch, 4 * width, h / stride, w / stride]`."""
        branch = self.expand(F.relu(self.spatial(F.relu(self.reduce(x)))))
        return F.relu(branch + self.shortcut(x))


class ResNet(nn.Module):
    """Classifies images by the mean over positions."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.stem = convolution(config.channels, config.stem, 7, stride=2)
        blocks: list[nn.Module] = []
        inputs = config.stem
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            for block in range(depth):
                blocks.append(Bottleneck(inputs, width, stride=2 if stage > 0 and block == 0 else 1))
                inputs = _EXPANSION * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """images `[batch, channels, image, image]` → `[batch, classes]`."""
        x = F.max_pool2d(F.relu(self.stem(images)), kernel_size=3, stride=2, padding=1)
        return self.head(self.blocks(x).mean(dim=(2, 3)))


def build(config: ResNetConfig = CONFIG) -> nn.Module:
    return ResNet(config)


def example_inputs(config: ResNetConfig = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    return (random_features(batch, config.channels, config.image, config.image, seed=seed),)
