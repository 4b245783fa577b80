"""Multi-head attention with quantised projections, scores, probabilities and context."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fuse_pass.numerics.attention import Heads, joined_masks, multi_head_attention
from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.quantization.layers.base import QuantizedLayer, simulated


class QuantizedMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` (1706.03762), batch first by default, every product on quantised operands.

    Query, key and value are quantised (`input`), the projections' weights and biases, and as `output` the projections,
    the scores, the probabilities and the context, so that both inner products see numbers of the format as well. Masks
    are added to the quantised scores: what is masked stays out in formats without an infinity, too.

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
        self._check_masks(q, k, attn_mask, key_padding_mask, batched=batched)
        output, weights = multi_head_attention(
            q,
            k,
            v,
            self._heads(),
            joined_masks(attn_mask, key_padding_mask, self.num_heads, q.dtype),
            self._output,
            need_weights=need_weights,
            average=average_attn_weights,
        )
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

    def _heads(self) -> Heads:
        if self._qkv_same_embed_dim:
            weights = self._weight(self.in_proj_weight).chunk(3)
        else:
            weights = tuple(self._weight(w) for w in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        bias = self._bias(self.in_proj_bias)
        more_keys = None
        if self.bias_k is not None and self.bias_v is not None:
            more_keys = self._at("bias", self.bias_k), self._at("bias", self.bias_v)
        return Heads(
            count=self.num_heads,
            weights=weights,
            biases=(None,) * 3 if bias is None else bias.chunk(3),
            more_keys=more_keys,
            zero_key=self.add_zero_attn,
            out_weight=self._weight(self.out_proj.weight),
            out_bias=self._bias(self.out_proj.bias),
            dropout_p=self.dropout,
            training=self.training,
        )

    def _check_masks(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, *, batched: bool
    ) -> None:
        batch, queries, keys = *q.shape[:2], k.shape[1]
        allowed: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
            "attn_mask": (attn_mask, [(queries, keys), (batch * self.num_heads, queries, keys)]),
            "key_padding_mask": (key_padding_mask, [(batch, keys) if batched else (keys,)]),
        }
        for name, (mask, shapes) in allowed.items():
            if mask is not None and tuple(mask.shape) not in shapes:
                expected = " or ".join(str(shape) for shape in shapes)
                raise RuntimeError(f"{name}: expected shape {expected}, got {tuple(mask.shape)}")
