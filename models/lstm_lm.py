"""LSTM language model with dropout between the layers (Zaremba et al., arXiv:1409.2329).

Where the patterns are: nowhere; it has dropout but no norm, and one Linear. Unless `torch._dynamo.config.allow_rnn`
is set, Dynamo gives up a frame that calls nn.LSTM: it runs eagerly as a whole and no graph reaches the backend. From
torch 2.15 on the layer alone runs eagerly.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from models.layers import random_tokens


@dataclass(frozen=True)
class LSTMConfig:
    vocab: int = 101
    dim: int = 32
    layers: int = 2
    dropout: float = 0.5

    @classmethod
    def large(cls) -> LSTMConfig:
        return cls(vocab=10000, dim=1500, dropout=0.65)


CONFIG = LSTMConfig()
EXPECTED: dict[str, dict[str, int]] = {"train": {}, "eval": {}}


class LSTMLanguageModel(nn.Module):
    """Scores the next token at every position."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.lstm = nn.LSTM(config.dim, config.dim, config.layers, batch_first=True, dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.dim, config.vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens `[batch, time]` → `[batch, time, vocab]`."""
        x, _ = self.lstm(self.dropout(self.tokens(tokens)))
        return self.head(self.dropout(x))


def build(config: LSTMConfig = CONFIG) -> nn.Module:
    return LSTMLanguageModel(config)


def example_inputs(config: LSTMConfig = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    return (random_tokens(config.vocab, batch, 17, seed=seed),)
