"""Multi-head attention with quantised projections, scores, probabilities and context."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.nn.quantized.base import QuantizedLayer, simulated
from fuse_pass.spec import QuantSpec


class QuantizedMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` (1706.03762), batch first by default, every product on quantised operands.

    Query, key and value are quantised (`input`), the projections' weights and biases, and as `output` the projections,
    the scores, the probabilities and the context, so that both inner products see numbers of the format as well.

    Args:
        embed_dim: features of query and output.
        num_heads: number of heads; divides `embed_dim`.
        exp_bits: exponent bits of an IEEE-like format, 2…11.
        sig_bits: its explicit fraction bits, 1…52.
        dropout: probability with which a probability is dropped in training.
        rmode: rounding mode, by number 0…9 or name.
        batch_first: whether the batch comes before the sequence.
        spec: what is quantised and how, instead of the format above.
        **of_torch: `bias`, `add_bias_kv`, `add_zero_attn`, `kdim`, `vdim`, `device` and `dtype`.
    """

    float_type = nn.MultiheadAttention

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        exp_bits: int = 5,
        sig_bits: int = 10,
        dropout: float = 0.0,
        rmode: int | str = 1,
        *,
        batch_first: bool = True,
        spec: QuantSpec | None = None,
        **of_torch: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, batch_first=batch_first, **of_torch)
        self.spec = spec or simulated(exp_bits, sig_bits, rmode)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Query `[B, Lq, E]`, key `[B, Lk, K]`, value `[B, Lk, V]` → output `[B, Lq, E]` and weights `[B, Lq, Lk]`.

        Without the batch dimension, with `batch_first=False`, and for masks, as `nn.MultiheadAttention`; weights are
        averaged over the heads, or `[B, heads, Lq, Lk]` with `average_attn_weights=False`.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        q, k, v = (self._input(t) for t in self._batch_first(query, key, value, batched=batched))
        q, k, v = self._project(q, k, v)
        mask = self._mask(q, k.shape[1], attn_mask, key_padding_mask)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat((k, self._bias(self.bias_k).expand(k.shape[0], -1, -1)), 1)  # type: ignore[union-attr]
            v = torch.cat((v, self._bias(self.bias_v).expand(v.shape[0], -1, -1)), 1)  # type: ignore[union-attr]
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = (torch.cat((t, t.new_zeros(*t.shape[:2], 1, t.shape[3])), 2) for t in (k, v))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))  # added keys are never masked

        scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
        scores = self._output(scores if mask is None else scores + mask)
        probabilities = self._output(torch.softmax(scores, -1))
        dropped = F.dropout(probabilities, self.dropout, self.training) if self.dropout > 0 else probabilities
        context = self._output((dropped @ v).transpose(1, 2).flatten(-2))
        weight, bias = self._weight(self.out_proj.weight), self._bias(self.out_proj.bias)
        output = self._output(F.linear(context, weight, bias))

        weights = (probabilities if dropped is probabilities else dropped) if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _batch_first(self, *tensors: Tensor, batched: bool) -> tuple[Tensor, ...]:
        for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
            if tensor.dim() not in (2, 3) or (tensor.dim() == 3) is not batched:
                raise ValueError(
                    f"{type(self).__name__}: expected query, key and value all of 3 dimensions (or all of 2, without "
                    f"the batch), got {name} of shape {tuple(tensor.shape)}"
                )
        if not batched:
            return tuple(tensor.unsqueeze(0) for tensor in tensors)
        return tensors if self.batch_first else tuple(tensor.transpose(0, 1) for tensor in tensors)

    def _project(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._qkv_same_embed_dim:
            weights = self._weight(self.in_proj_weight).chunk(3)
        else:
            weights = tuple(self._weight(w) for w in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        bias = self._bias(self.in_proj_bias)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (self._output(F.linear(x, w, b)) for x, w, b in zip((q, k, v), weights, biases, strict=True))
        return q, k, v

    def _mask(self, q: Tensor, keys: int, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores `[B, heads or 1, Lq, Lk]`; True means "must not be seen"."""
        batch, queries = q.shape[:2]
        total = None
        if attn_mask is not None:
            allowed = ((queries, keys), (batch * self.num_heads, queries, keys))
            if tuple(attn_mask.shape) not in allowed:
                raise RuntimeError(
                    f"attn_mask: expected shape {allowed[0]} or {allowed[1]}, got {tuple(attn_mask.shape)}"
                )
            total = _additive(attn_mask, q.dtype)
            total = total.view(batch, -1, queries, keys) if total.dim() == 3 else total[None, None]
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype).reshape(-1, 1, 1, keys)
            total = padding if total is None else total + padding
        return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -torch.inf)
    return mask.to(dtype)
