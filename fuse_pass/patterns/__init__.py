"""The patterns, in the order in which they are applied; to add one, write its file and add it to `PATTERNS`."""

from typing import Any

from fuse_pass.patterns import (
    attention_projections,
    dense,
    dense_act_dense,
    dropout_norm,
    gated_dense,
    prepack,
)
from fuse_pass.patterns.fake_quantization import insert as fake_quant
from fuse_pass.patterns.pattern import Candidate, NearMiss, Pattern, Situation, apply

PATTERNS: tuple[Pattern[Any], ...] = (gated_dense.PATTERN, dense_act_dense.PATTERN, dropout_norm.PATTERN, dense.PATTERN)

__all__ = [
    "PATTERNS", "Candidate", "NearMiss", "Pattern", "Situation", "apply", "attention_projections", "dense",
    "fake_quant", "prepack",
]  # fmt: skip
