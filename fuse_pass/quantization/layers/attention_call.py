"""How `nn.MultiheadAttention` is called: the layouts and masks that it takes, around any projections."""

from __future__ import annotations

from torch import Tensor, nn

from fuse_pass.numerics.attention import Heads, joined_masks, multi_head_attention


class AttentionCall(nn.Module):
    """`forward` of `nn.MultiheadAttention`, for a layer that says what it multiplies with."""

    num_heads: int
    batch_first: bool

    def heads(self) -> Heads:
        """What this call multiplies with."""
        raise NotImplementedError

    def _input(self, x: Tensor) -> Tensor:
        return x

    def _output(self, y: Tensor) -> Tensor:
        return y

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
        mask = joined_masks(attn_mask, key_padding_mask, self.num_heads, q.dtype)
        output, weights = self._attend(q, k, v, mask, need_weights=need_weights, average=average_attn_weights)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Batch first."""
        heads = self.heads()
        return multi_head_attention(q, k, v, heads, mask, self._output, need_weights=need_weights, average=average)

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
