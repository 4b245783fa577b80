"""What several reference models share: attention, the feed-forward network, the pre-norm block, patches, inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[batch, time, heads * head_dim]` → `[batch, heads, time, head_dim]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """`[batch, heads, time, head_dim]` → `[batch, time, heads * head_dim]`."""
    return x.transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention; one projection yields key and value together.

    Args:
        dim: width of input and output.
        heads: number of heads.
        head_dim: width of one head; None for `dim // heads`.
        bias: whether the projections have biases.
        causal: whether position t reads positions 0 … t only.
        scale: factor before the softmax; None for `head_dim ** -0.5`.
        dropout: probability of dropping an attention weight.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = heads * (head_dim or dim // heads)
        self.heads, self.causal, self.scale, self.dropout = heads, causal, scale, dropout
        self.query = nn.Linear(dim, inner, bias=bias)
        self.key_value = nn.Linear(dim, 2 * inner, bias=bias)
        self.output = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attends from x to the context.

        Args:
            x: `[batch, time, dim]`.
            context: `[batch, context_time, dim]`; None for x itself.
            mask: True where attention is allowed, or numbers added to the scores; broadcast to
                `[batch, heads, time, context_time]`.

        Returns:
            `[batch, time, dim]`.
        """
        key, value = self.key_value(x if context is None else context).chunk(2, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in (self.query(x), key, value))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=self.causal, scale=self.scale
        )
        return self.output(merge_heads(attended))


def feed_forward(
    dim: int, hidden: int, activation: nn.Module, *, dropout: float | None = None, bias: bool = True
) -> nn.Sequential:
    """Linear → activation → [dropout] → Linear on `[..., dim]`; a model without that dropout passes None."""
    between = [] if dropout is None else [nn.Dropout(dropout)]
    return nn.Sequential(nn.Linear(dim, hidden, bias=bias), activation, *between, nn.Linear(hidden, dim, bias=bias))


class PreNormBlock(nn.Module):
    """Transformer block with a norm before each branch: `x = x + dropout(branch(norm(x)))`.

    Args:
        self_attention: first branch.
        feed_forward: last branch.
        norm: makes the norm of one branch.
        dropout: probability of dropping an element of a branch.
        cross_attention: branch between the two, in decoders that read an encoder.
    """

    def __init__(
        self,
        self_attention: Attention,
        feed_forward: nn.Module,
        norm: Callable[[], nn.Module],
        dropout: float,
        cross_attention: Attention | None = None,
    ) -> None:
        super().__init__()
        self.self_attention_norm, self.self_attention = norm(), self_attention
        self.cross_attention = cross_attention
        self.cross_attention_norm = None if cross_attention is None else norm()
        self.feed_forward_norm, self.feed_forward = norm(), feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """x `[batch, time, dim]`, mask as in `Attention`, context `[batch, context_time, dim]` → like x."""
        x = x + self.dropout(self.self_attention(self.self_attention_norm(x), mask=mask))
        if self.cross_attention is not None:
            x = x + self.dropout(self.cross_attention(self.cross_attention_norm(x), context))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class PatchEmbedding(nn.Module):
    """Cuts images `[batch, channels, height, width]` into square patches → `[batch, patches, dim]`."""

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images).flatten(2).transpose(1, 2)


def random_tokens(vocab: int, *shape: int, seed: int) -> Tensor:
    """Integers below `vocab`, the same for the same seed."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def random_features(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
