"""GRU encoder-decoder with attention.

The bidirectional encoder is that of Bahdanau et al. (arXiv:1409.0473); attention follows the decoder as in Luong et al.
(arXiv:1508.04025), so that the decoder runs over the whole target in one call.

Where the patterns are: behind the attention, Linear → tanh → dropout → Linear. Unless `torch._dynamo.config.allow_rnn`
is set, Dynamo gives up a frame that calls nn.GRU: it runs eagerly as a whole and no graph reaches the backend. From
torch 2.15 on the layers alone run eagerly, and what lies between them is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import random_tokens


@dataclass(frozen=True)
class Seq2SeqConfig:
    source_vocab: int = 101
    target_vocab: int = 83
    embedding: int = 24
    hidden: int = 32
    dropout: float = 0.2

    @classmethod
    def rnnsearch(cls) -> Seq2SeqConfig:
        return cls(source_vocab=30000, target_vocab=30000, embedding=620, hidden=1000)


CONFIG = Seq2SeqConfig()
_FOUND: dict[str, int] = {"dense_act_dense": 1} if torch.__version__ >= "2.15" else {}
EXPECTED = {"train": _FOUND, "eval": _FOUND}


class Seq2Seq(nn.Module):
    """Scores the next target token at every position, the target before it being given."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        memory = 2 * config.hidden
        self.source_tokens = nn.Embedding(config.source_vocab, config.embedding)
        self.target_tokens = nn.Embedding(config.target_vocab, config.embedding)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.GRU(config.embedding, config.hidden, batch_first=True, bidirectional=True)
        self.start = nn.Linear(config.hidden, config.hidden)
        self.decoder = nn.GRU(config.embedding, config.hidden, batch_first=True)
        self.query = nn.Linear(config.hidden, memory, bias=False)
        self.combine = nn.Linear(config.hidden + memory, config.hidden)
        self.head = nn.Linear(config.hidden, config.target_vocab)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """source `[batch, source_time]`, target `[batch, target_time]` → `[batch, target_time, target_vocab]`."""
        memory, final = self.encoder(self.dropout(self.source_tokens(source)))
        start = torch.tanh(self.start(final[1]))[None]  # of the backward direction, which ends at the first word
        states, _ = self.decoder(self.dropout(self.target_tokens(target)), start)
        context = F.scaled_dot_product_attention(self.query(states), memory, memory, scale=1.0)
        attentional = torch.tanh(self.combine(torch.cat([states, context], dim=-1)))
        return self.head(self.dropout(attentional))


def build(config: Seq2SeqConfig = CONFIG) -> nn.Module:
    return Seq2Seq(config)


def example_inputs(config: Seq2SeqConfig = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    source = random_tokens(config.source_vocab, batch, 17, seed=seed)
    return source, random_tokens(config.target_vocab, batch, 11, seed=seed + 1)
