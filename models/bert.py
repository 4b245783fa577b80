"""BERT with its pre-training heads (Devlin et al., arXiv:1810.04805): a post-norm transformer encoder.

Where the patterns are:
    dense_act_dense: the feed-forward network of each layer. The masked-token head has Linear → GELU too, but a
        LayerNorm behind it.
    dropout_norm: each layer twice, `norm(x + dropout(branch))`; the embeddings once, their sum goes into a LayerNorm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Attention, feed_forward, random_tokens


@dataclass(frozen=True)
class BertConfig:
    vocab: int = 101
    segments: int = 2
    positions: int = 19
    dim: int = 32
    hidden: int = 80
    heads: int = 4
    layers: int = 2
    dropout: float = 0.1
    eps: float = 1e-12

    @classmethod
    def base(cls) -> BertConfig:
        return cls(vocab=30522, positions=512, dim=768, hidden=3072, heads=12, layers=12)


CONFIG = BertConfig()
EXPECTED = {
    "train": {"dense_act_dense": 3, "dropout_norm": 5},
    "eval": {"dense_act_dense": 3, "dropout_norm": 5},
}


class Embeddings(nn.Module):
    """Sum of token, segment and position embeddings, normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.segments = nn.Embedding(config.segments, config.dim)
        self.positions = nn.Embedding(config.positions, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, segments: Tensor) -> Tensor:
        """tokens and segments `[batch, time]` → `[batch, time, dim]`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.dropout(self.norm(self.tokens(tokens) + self.segments(segments) + self.positions(positions)))


class Layer(nn.Module):
    """Self-attention and feed-forward network, each followed by dropout, residual and norm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config.dim, config.heads, dropout=config.dropout)
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.feed_forward = feed_forward(config.dim, config.hidden, nn.GELU())
        self.feed_forward_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x `[batch, time, dim]`, mask `[batch, 1, 1, time]` (True where there is a token) → like x."""
        x = self.attention_norm(x + self.dropout(self.attention(x, mask=mask)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Bert(nn.Module):
    """Scores every token of the vocabulary at every position, and whether the second segment follows the first."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.pooler = nn.Linear(config.dim, config.dim)
        self.next_sentence = nn.Linear(config.dim, 2)
        self.token_transform = nn.Linear(config.dim, config.dim)
        self.token_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.token_bias = nn.Parameter(torch.zeros(config.vocab))

    def forward(self, tokens: Tensor, segments: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts masked tokens and the order of the segments.

        Args:
            tokens: `[batch, time]`.
            segments: `[batch, time]`, 0 or 1.
            mask: `[batch, time]`, False at padding.

        Returns:
            `[batch, time, vocab]` and `[batch, 2]`.
        """
        x = self.embeddings(tokens, segments)
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        order = self.next_sentence(torch.tanh(self.pooler(x[:, 0])))
        transformed = self.token_norm(F.gelu(self.token_transform(x)))
        return F.linear(transformed, self.embeddings.tokens.weight, self.token_bias), order


def build(config: BertConfig = CONFIG) -> nn.Module:
    return Bert(config)


def example_inputs(config: BertConfig = CONFIG, batch: int = 2, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Full sequences but for the last one, which ends in three tokens of padding."""
    time = config.positions - 2
    tokens = random_tokens(config.vocab, batch, time, seed=seed)
    segments = (torch.arange(time) >= time // 2).long().expand(batch, time)
    mask = torch.ones(batch, time, dtype=torch.bool)
    mask[-1, -3:] = False
    return tokens, segments, mask
