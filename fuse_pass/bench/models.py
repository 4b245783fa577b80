"""The modules that `bench` builds itself: the operations alone, and transformers of published width without heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DropoutAddNorm(nn.Module):
    """`LayerNorm(residual + dropout(x))`."""

    def __init__(self, dim: int, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(residual + self.dropout(x))  # type: ignore[no-any-return]


def mlp(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class BertEncoder(nn.Module):
    """The embeddings and layers of the reference BERT, without the heads that are used in pre-training only."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.embeddings, self.layers = bert.embeddings, bert.layers

    def forward(self, tokens: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        """tokens, segments and mask `[batch, time]` → `[batch, time, dim]`."""
        x = self.embeddings(tokens, segments)
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        return x  # type: ignore[no-any-return]


class SentenceEncoder(nn.Module):
    """A BERT of transformers, as exporters like it: tensors by position, and the hidden state alone."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
        """tokens, mask and segments `[sentences, time]` → `[sentences, time, dim]`."""
        encoded = self.bert(input_ids=tokens, attention_mask=mask, token_type_ids=segments)
        return encoded.last_hidden_state  # type: ignore[no-any-return]


class GPT2Decoder(nn.Module):
    """The embeddings, blocks and last norm of the reference GPT-2, without the scores of the vocabulary."""

    def __init__(self, gpt2: Any) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = gpt2.tokens, gpt2.positions, gpt2.dropout
        self.blocks, self.norm = gpt2.blocks, gpt2.norm

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens `[batch, time]` → `[batch, time, dim]`."""
        x = self.dropout(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]
