"""The plain classifier: a Linear with dropout and LayerNorm, then three Linear layers with LeakyReLU and GELU between.

GELU is arXiv:1606.08415, LayerNorm arXiv:1607.06450.

Where the patterns are:
    dense_act_dense: twice, as a chain: the middle Linear ends the first and begins the second.
    dropout_norm: the dropout before the LayerNorm; there is no residual.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from models.layers import random_features


@dataclass(frozen=True)
class ClassifierConfig:
    features: int = 52
    dim: int = 48
    hidden: tuple[int, int] = (40, 24)
    classes: int = 10
    dropout: float = 0.1

    @classmethod
    def digits(cls) -> ClassifierConfig:
        """For images of 28 × 28 pixels."""
        return cls(features=784, dim=512, hidden=(256, 128))


CONFIG = ClassifierConfig()
EXPECTED = {
    "train": {"dense_act_dense": 2, "dropout_norm": 1},
    "eval": {"dense_act_dense": 2, "dropout_norm": 1},
}


class Classifier(nn.Module):
    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        first, second = config.hidden
        self.stem = nn.Sequential(
            nn.Linear(config.features, config.dim), nn.Dropout(config.dropout), nn.LayerNorm(config.dim)
        )
        self.layers = nn.Sequential(
            nn.Linear(config.dim, first),
            nn.LeakyReLU(0.01),
            nn.Linear(first, second),
            nn.GELU(),
            nn.Linear(second, config.classes),
        )

    def forward(self, features: Tensor) -> Tensor:
        """features `[batch, features]` → `[batch, classes]`."""
        return self.layers(self.stem(features))


def build(config: ClassifierConfig = CONFIG) -> nn.Module:
    return Classifier(config)


def example_inputs(config: ClassifierConfig = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    return (random_features(batch, config.features, seed=seed),)
