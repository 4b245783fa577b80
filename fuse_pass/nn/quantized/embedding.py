"""Embedding with quantised rows."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.nn.quantized.base import QuantizedLayer, at, simulated
from fuse_pass.spec import QuantSpec


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """`nn.Embedding` whose weight and output are quantised; indices `[...]` → `[..., embedding_dim]`.

    The rows are quantised after they are looked up, so that the cost follows the batch and not the vocabulary; scales
    of integer formats are therefore per row. `max_norm` rescales the master weight in place, as in `nn.Embedding`.

    Args:
        *of_torch: arguments of `nn.Embedding`.
        exp_bits: exponent bits of an IEEE-like format, 2…11.
        sig_bits: its explicit fraction bits, 1…52.
        rmode: rounding mode, by number 0…9 or name.
        spec: what is quantised and how, instead of the format above.
        **options: further arguments of `nn.Embedding`.
    """

    float_type = nn.Embedding

    def __init__(
        self,
        *of_torch: Any,
        exp_bits: int = 5,
        sig_bits: int = 10,
        rmode: int | str = 1,
        spec: QuantSpec | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*of_torch, **options)
        self.spec = spec or simulated(exp_bits, sig_bits, rmode)

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        site = self.spec.weight
        if site is not None and not site.needs_scale and (by_row := site.of_rows()) is not site:
            return self._output(at(by_row, rows))
        return self._output(self._weight(rows))
