"""Multi-head attention whose projections hold their weights in few bits; made by `fuse_pass.pack`."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.numerics.attention import Heads, in_heads, padded_mask
from fuse_pass.quantization.layers.attention_call import AttentionCall
from fuse_pass.quantization.layers.packed import PackedLinear, PackedParts
from fuse_pass.quantization.packing import PackSpec

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class PackedMultiheadAttention(PackedParts, AttentionCall):
    """`nn.MultiheadAttention` (1706.03762) with four packed projections; scores and context in the dtype of the query.

    The projections are `PackedLinear` layers, `q_proj`, `k_proj`, `v_proj` and `out_proj`. Called and answered as
    `nn.MultiheadAttention`; `to_float()` gives one back.

    Args:
        attention: whose weights are packed; the biases become Parameters of their own, one per projection.
        spec: how they are packed.

    Raises:
        ValueError: see `packing.packed`.
    """

    plain_weights = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")

    # What encoder layers ask before they take PyTorch's fast path, which reads bare weights.
    in_proj_bias = None

    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(self, attention: nn.MultiheadAttention, spec: PackSpec) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = attention.embed_dim, attention.kdim, attention.vdim
        self.num_heads, self.dropout = attention.num_heads, attention.dropout
        self.batch_first, self.add_zero_attn = attention.batch_first, attention.add_zero_attn
        self.spec = spec
        biases: tuple[Tensor | None, ...] = (None,) * 3
        if attention.in_proj_bias is not None:
            biases = attention.in_proj_bias.detach().chunk(3)
        for name, weight, bias in zip(_PROJECTIONS, _weights_of(attention), biases, strict=True):
            own = None if bias is None else nn.Parameter(bias.clone(), attention.in_proj_bias.requires_grad)
            setattr(self, name, PackedLinear.of_weight(weight, spec, own))
        self.out_proj = PackedLinear.of_weight(attention.out_proj.weight, spec, attention.out_proj.bias)
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v
        self.train(attention.training)

    def heads(self) -> Heads:
        more_keys = None if self.bias_k is None or self.bias_v is None else (self.bias_k, self.bias_v)
        return Heads(
            count=self.num_heads,
            project=lambda *operands: [
                self.get_submodule(name)(x) for name, x in zip(_PROJECTIONS, operands, strict=True)
            ],
            project_context=self.out_proj,
            more_keys=more_keys,
            zero_key=self.add_zero_attn,
            dropout_p=self.dropout,
            training=self.training,
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights:
            return super()._attend(q, k, v, mask, need_weights=need_weights, average=average)
        heads = self.heads()
        q, k, v = in_heads(heads.project(q, k, v), heads)
        mask, dropout_p = padded_mask(mask, heads, q.dtype), self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        return self.out_proj(context.transpose(1, 2).flatten(-2)), None

    @torch.no_grad()
    def to_float(self) -> nn.MultiheadAttention:
        """An `nn.MultiheadAttention` with the real numbers that the codes stand for."""
        parts = [cast(PackedLinear, self.get_submodule(name)) for name in (*_PROJECTIONS, "out_proj")]
        projections = [part.to_float() for part in parts]
        weights = [projection.weight for projection in projections]
        has_bias, has_more_keys = projections[0].bias is not None, self.bias_k is not None
        attention = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, bias=has_bias, add_bias_kv=has_more_keys,
            add_zero_attn=self.add_zero_attn, kdim=self.kdim, vdim=self.vdim, batch_first=self.batch_first,
            device="meta",
        )  # fmt: skip
        if attention.in_proj_weight is not None:
            attention.in_proj_weight = nn.Parameter(torch.cat(weights[:3]))
        else:
            for name, weight in zip(_PROJECTIONS, weights, strict=False):
                setattr(attention, f"{name}_weight", weight)
        if has_bias:
            attention.in_proj_bias = nn.Parameter(torch.cat([projection.bias for projection in projections[:3]]))
        attention.out_proj.weight, attention.out_proj.bias = weights[3], projections[3].bias
        attention.bias_k, attention.bias_v = self.bias_k, self.bias_v
        return attention.train(self.training)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {self.spec}"


def _weights_of(attention: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    """Of query, key and value."""
    if attention.in_proj_weight is not None:
        return attention.in_proj_weight.detach().chunk(3)
    return attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
