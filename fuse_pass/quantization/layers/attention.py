"""Multi-head attention with quantised projections, scores, probabilities and context."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from fuse_pass.numerics.attention import Heads, by_weights
from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.quantization.layers.attention_call import AttentionCall
from fuse_pass.quantization.layers.base import QuantizedLayer, simulated


class QuantizedMultiheadAttention(QuantizedLayer, AttentionCall, nn.MultiheadAttention):
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

    def heads(self) -> Heads:
        if self._qkv_same_embed_dim:
            weights = self._weight(self.in_proj_weight).chunk(3)
        else:
            weights = tuple(self._weight(w) for w in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        bias = self._bias(self.in_proj_bias)
        out_weight, out_bias = self._weight(self.out_proj.weight), self._bias(self.out_proj.bias)
        more_keys = None
        if self.bias_k is not None and self.bias_v is not None:
            more_keys = self._at("bias", self.bias_k), self._at("bias", self.bias_v)
        return Heads(
            count=self.num_heads,
            project=by_weights(weights, (None,) * 3 if bias is None else bias.chunk(3)),
            project_context=lambda context: F.linear(context, out_weight, out_bias),
            more_keys=more_keys,
            zero_key=self.add_zero_attn,
            dropout_p=self.dropout,
            training=self.training,
        )
