"""Attention written out, rounded by the caller at the steps at which quantised attention rounds.

    scores = rounded(scale · q kᵀ) + mask        probabilities = rounded(softmax(scores))
    context = dropout(probabilities) v           multi-head: y = rounded(rounded(context) Wᵀ + b)

q `[…, Lq, D]`, k and v `[…, Lk, D]`, mask broadcast to `[…, Lq, Lk]`. The mask comes after the rounding: −inf has no
place among the numbers of most formats, and what is masked must stay out whatever they are.
Shapes are read only, never computed with, so that a graph of any sizes can be made of these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rounded = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Heads:
    """What multi-head attention multiplies with and how; every tensor as its product sees it.

    Attributes:
        count: number of heads.
        project: the projections of query, key and value, before they are rounded.
        project_context: that of the context.
        more_keys: a key and a value `[1, 1, E]` that every sequence gets as well, or None.
        zero_key: whether every sequence gets a key and a value of zeros as well.
        dropout_p: probability with which a probability is dropped.
        training: whether any is.
    """

    count: int
    project: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]
    project_context: Rounded
    more_keys: tuple[Tensor, Tensor] | None
    zero_key: bool
    dropout_p: float
    training: bool


def by_weights(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]:
    """`Heads.project` by three weights, and a bias or None for each."""

    def project(*operands: Tensor) -> Sequence[Tensor]:
        return [F.linear(x, weight, bias) for x, weight, bias in zip(operands, weights, biases, strict=True)]

    return project


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Heads,
    mask: Tensor | None,
    rounded: Rounded,
    *,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """Batch first: query `[B, Lq, E]`, key `[B, Lk, K]`, value `[B, Lk, V]` → `[B, Lq, E]` and weights `[B, Lq, Lk]`.

    Without `average`, weights are `[B, heads, Lq, Lk]`. Rows without any key to see are NaN if the weights are needed
    and context 0 if not, as in PyTorch.
    """
    q, k, v = in_heads([rounded(x) for x in heads.project(query, key, value)], heads)
    mask = padded_mask(mask, heads, q.dtype)
    probabilities = _probabilities(
        q, k, mask, math.sqrt(1.0 / q.shape[-1]), rounded, empty_rows_are_zero=not need_weights
    )
    dropped = F.dropout(probabilities, heads.dropout_p, heads.training)
    context = rounded((dropped @ v).transpose(1, 2).flatten(-2))
    output = rounded(heads.project_context(context))
    if not need_weights:
        return output, None
    return output, dropped.mean(1) if average else dropped


def in_heads(projected: Sequence[Tensor], heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[B, L, E]` as `[B, heads, L, D]`, with the keys and values that are added."""
    q, k, v = projected
    if heads.more_keys is not None:
        k, v = (
            torch.cat((t, row.expand(t.shape[0], -1, -1)), 1) for t, row in zip((k, v), heads.more_keys, strict=True)
        )
    q, k, v = (t.unflatten(-1, (heads.count, -1)).transpose(1, 2) for t in (q, k, v))
    if heads.zero_key:
        k, v = (torch.cat((t, t.new_zeros((*t.shape[:2], 1, t.shape[3]))), 2) for t in (k, v))
    return q, k, v


def padded_mask(mask: Tensor | None, heads: Heads, dtype: torch.dtype) -> Tensor | None:
    """The mask with columns for the keys that are added, which are never masked."""
    return None if mask is None else F.pad(mask.to(dtype), (0, int(heads.more_keys is not None) + int(heads.zero_key)))


def joined_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks of multi-head attention as one that is added to the scores; True means "must not be seen".

    Args:
        attn_mask: `[Lq, Lk]` or `[B · heads, Lq, Lk]`.
        key_padding_mask: `[B, Lk]` or `[Lk]`.
        heads: number of heads.
        dtype: of the result, which broadcasts to `[B, heads, Lq, Lk]`.
    """
    total = None
    if attn_mask is not None:
        total = _additive(attn_mask, dtype)
        total = total.unflatten(0, (-1, heads)) if total.ndim == 3 else total
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, dtype).unsqueeze(-2).unsqueeze(-2)
        total = padding if total is None else total + padding
    return total


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: Any = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    rounded: Rounded,
) -> Tensor:
    """As `F.scaled_dot_product_attention`, where a mask of bool is True for what may be seen; the context as it is."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    mask = attn_mask
    if is_causal:
        mask = query.new_ones((query.shape[-2], key.shape[-2]), dtype=torch.bool).tril()
    if mask is not None:
        mask = _additive(mask.logical_not() if mask.dtype is torch.bool else mask, query.dtype)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    probabilities = _probabilities(query, key, mask, factor, rounded, empty_rows_are_zero=True)
    return F.dropout(probabilities, dropout_p) @ value


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, rounded: Rounded, *, empty_rows_are_zero: bool
) -> Tensor:
    scores = rounded((q * scale) @ k.transpose(-2, -1))
    if mask is None:
        return rounded(torch.softmax(scores, -1))
    scores = scores + mask
    if not empty_rows_are_zero:
        return rounded(torch.softmax(scores, -1))
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return rounded(torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return mask.to(dtype)
