"""A Linear as models write it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.patterns.spellings.corpus import Corpus


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The formula in eager PyTorch."""
    return F.linear(x, weight, bias)


def _example_inputs(
    dtype: torch.dtype = torch.float32, *, bias: bool = True, rows: tuple[int, ...] = (20, 30)
) -> dict[str, Any]:
    """Large enough for every break-even that was measured."""

    def parameter(*shape: int) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) / math.sqrt(shape[-1])).to(dtype).requires_grad_()

    return {
        "x": torch.randn(*rows, 96, dtype=torch.float64).to(dtype).requires_grad_(),
        "weight": parameter(112, 96),
        "bias": parameter(112) if bias else None,
    }


# Called as f(x, weight, bias); each must be found once where the product pays.
_SPELLINGS: dict[str, Any] = {
    "linear": F.linear,
    "inactive dropout": lambda x, w, b: F.linear(F.dropout(x, 0.5, False), w, b),
    "no bias": lambda x, w, b: F.linear(x, w),
    "matmul": lambda x, w, b: x @ w.T + b,
    "matmul, bias first": lambda x, w, b: b + torch.matmul(x, w.mT),
    "matmul, no bias": lambda x, w, b: x.matmul(w.t()),
    "matmul, weight stored [in, out]": lambda x, w, b: x @ w.t().contiguous(),
    "addmm (Conv1D)": lambda x, w, b: torch.addmm(b, x.view(-1, x.size(-1)), w.t().contiguous()),
    "read twice": lambda x, w, b: (lambda y: y + torch.sin(y))(F.linear(x, w, b)),
}


CORPUS = Corpus(_reference, _SPELLINGS, _example_inputs)
