"""An Embedding that holds its table in few bits, for inference; made by `fuse_pass.pack`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.quantization.layers.packed import PackedLayer
from fuse_pass.quantization.packing import PackSpec, weight_only_codes


class PackedEmbedding(PackedLayer):
    """`[...] → [..., embedding_dim]`: rows of a table of 8 or 4 bits, `scale · code − shift` per group of a row.

    The table is no Parameter and gets no gradient. `to_float()` gives an `nn.Embedding` back. Results are in the dtype
    that the table had, or that `.to(dtype)` says; computed in float32.

    The state dict holds `words` (uint8 `[num_embeddings, bytes of a row]`, of 4 bits the even places in the low half),
    `scale` `[num_embeddings, groups]`, for some specs `shift`, and `packed_format` (uint8, JSON: the spec and its
    version).

    Args:
        embedding: whose table it is.
        spec: how the table is packed, one whose inputs stay as they are.

    Raises:
        ValueError: a table with NaN or infinity.
    """

    follow_dtype = ("like",)

    shift: Tensor | None
    like: Tensor

    def __init__(self, embedding: nn.Embedding, spec: PackSpec) -> None:
        weight = embedding.weight.detach()
        found = weight_only_codes(weight, spec)
        super().__init__(spec.to_bytes(), _in_rows(found.codes, spec.bits))
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.spec = embedding.padding_idx, spec
        # For the way back alone: they are about gradients.
        self._trained = {"scale_grad_by_freq": embedding.scale_grad_by_freq, "sparse": embedding.sparse}
        self.register_buffer("scale", found.scale)
        self.register_buffer("shift", found.shift)
        self._register_table(spec.table)
        self.register_buffer("like", weight.new_empty(0), persistent=False)
        self.train(embedding.training)

    def forward(self, indices: Tensor) -> Tensor:
        """Raises what `nn.Embedding` raises for indices that the table does not have."""
        rows, scale = (F.embedding(indices, part) for part in (self.words, self.scale))
        shift = None if self.shift is None else F.embedding(indices, self.shift)
        return self._real(rows, scale, shift).to(self.like.dtype)

    def real_weight(self) -> Tensor:
        return self._real(self.words, self.scale, self.shift)

    def _real(self, rows: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        """`[..., embedding_dim]`, float32."""
        if self.table is None:
            values = rows.view(torch.int8).float()
        else:
            halves = torch.stack([rows & 15, rows >> 4], -1).flatten(-2)
            values = self.table[halves.int()]
        groups = scale.shape[-1]
        if groups == 0:  # nothing in a row
            return values
        grouped = values.unflatten(-1, (groups, -1)) * scale.unsqueeze(-1)
        grouped = grouped if shift is None else grouped - shift.unsqueeze(-1)
        real: Tensor = grouped.flatten(-2)[..., : self.embedding_dim]
        return real

    @torch.no_grad()
    def to_float(self) -> nn.Embedding:
        """An `nn.Embedding` with the real numbers that the codes stand for."""
        weight = self.real_weight().to(self.like.dtype)
        sizes = (self.num_embeddings, self.embedding_dim, self.padding_idx)
        embedding = nn.Embedding(*sizes, _weight=weight, **self._trained)
        return embedding.train(self.training)

    def _described(self, content: bytes) -> object:
        return PackSpec.from_bytes(content)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.spec}"


def _in_rows(codes: Tensor, bits: int) -> Tensor:
    return codes if bits == 8 else codes[:, ::2] | (codes[:, 1::2] << 4)
