"""`nn.MultiheadAttention` in every form in which models call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.quantization.samples import SAMPLES, Sample

MASK = torch.tensor([[False, True, False, False, True], [False] * 5])
BIAS = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(1))
BATCHED = ((2, 4, 8), (2, 5, 8), (2, 5, 8))


def sample(*shapes: tuple[int, ...], call: dict[str, Any] | None = None, **options: Any) -> Sample:
    return Sample(nn.MultiheadAttention, (8, 2), shapes, options, call or {})


FORMS = (
    *(s for s in SAMPLES if s.type is nn.MultiheadAttention),
    sample(*BATCHED, batch_first=True, call={"need_weights": False}),
    sample(*BATCHED, batch_first=True, call={"need_weights": False, "key_padding_mask": MASK}),
    sample(*BATCHED, batch_first=True, call={"attn_mask": BIAS, "average_attn_weights": False}),
    sample(*BATCHED, batch_first=True, call={"attn_mask": BIAS[0], "key_padding_mask": MASK * -2.0}),
    sample((4, 8), (5, 8), (5, 8), call={"key_padding_mask": MASK[0], "need_weights": False}),
    sample((5, 1, 8), (5, 1, 8), (5, 1, 8), bias=False),
    sample((1, 5, 8), (1, 5, 8), (1, 5, 8), batch_first=True, add_zero_attn=True),
)
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.id)
