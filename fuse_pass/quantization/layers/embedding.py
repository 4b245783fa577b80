"""Embedding with quantised rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.quantization.functional import quantize_at
from fuse_pass.quantization.layers.base import ByFormat


class QuantizedEmbedding(ByFormat, nn.Embedding):
    """`nn.Embedding` whose weight and output are quantised; indices `[...]` → `[..., embedding_dim]`.

    The rows are quantised after they are looked up, so that the cost follows the batch and not the vocabulary; scales
    of integer formats are therefore per row. `max_norm` rescales the master weight in place, as in `nn.Embedding`.
    Arguments as `ByFormat` says.
    """

    float_type = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        site = self.spec.weight
        if site is not None and not site.needs_scale and (by_row := site.of_rows()) is not site:
            return self._output(quantize_at(by_row, rows))
        return self._output(self._weight(rows))
