"""Gated feed-forward blocks as models write them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.patterns.spellings.corpus import Corpus


def _reference(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "silu",
    arguments: tuple[float, ...] = (),
    keep: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """The formula in eager PyTorch; `keep` is the dropout mask, shaped like the hidden value."""
    gate = ACTIVATIONS[activation].forward(F.linear(x, gate_weight, gate_bias), arguments, None)
    a = gate * F.linear(x, up_weight, up_bias)
    if keep is not None:
        a = torch.where(keep, a / (1 - p), 0.0) if p < 1 else torch.zeros_like(a)
    return F.linear(a, weight2, bias2)


def _example_inputs(
    dtype: torch.dtype = torch.float32, *, bias: bool = True, rows: tuple[int, ...] = (3, 5)
) -> dict[str, Any]:
    def parameter(*shape: int) -> Tensor:
        value = torch.randn(*shape, dtype=torch.float64) / math.sqrt(shape[-1])
        return value.to(dtype).requires_grad_()

    return {
        "x": torch.randn(*rows, 8, dtype=torch.float64).to(dtype).requires_grad_(),
        "gate_weight": parameter(24, 8),
        "gate_bias": parameter(24) if bias else None,
        "up_weight": parameter(24, 8),
        "up_bias": parameter(24) if bias else None,
        "weight2": parameter(16, 24),
        "bias2": parameter(16) if bias else None,
    }


def _merged(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor) -> Tensor:
    return F.linear(x, torch.cat([wg, wu]), torch.cat([bg, bu]))


def _chunked(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    gate, up = _merged(x, wg, bg, wu, bu).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w2, b2)


def _gate_second(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    up, gate = torch.split(_merged(x, wu, bu, wg, bg), wg.shape[0], -1)
    return F.linear(up * F.gelu(gate), w2, b2)


def _dropped(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    gate, up = torch.chunk(_merged(x, wg, bg, wu, bu), 2, -1)
    return F.linear(F.dropout(F.gelu(gate, approximate="tanh") * up, 0.25), w2, b2)


def _separate(activation: Any) -> Any:
    return lambda x, wg, bg, wu, bu, w2, b2: F.linear(activation(F.linear(x, wg, bg)) * F.linear(x, wu, bu), w2, b2)


# Called as f(x, gate_weight, gate_bias, up_weight, up_bias, weight2, bias2); each must be found once.
_SPELLINGS: dict[str, Any] = {
    "silu": _separate(F.silu),
    "gelu": _separate(F.gelu),
    "gelu tanh": _separate(lambda h: F.gelu(h, approximate="tanh")),
    "relu": _separate(F.relu),
    "sigmoid": _separate(torch.sigmoid),
    "silu written out": _separate(lambda h: h * torch.sigmoid(h)),
    "gelu tanh written out": _separate(
        lambda h: 0.5 * h * (1.0 + torch.tanh(0.7978845608028654 * (h + 0.044715 * torch.pow(h, 3.0))))
    ),
    "up first": lambda x, wg, bg, wu, bu, w2, b2: F.linear(F.linear(x, wu, bu) * F.silu(F.linear(x, wg, bg)), w2, b2),
    "dropout": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        F.dropout(F.silu(F.linear(x, wg, bg)) * F.linear(x, wu, bu), 0.25), w2, b2
    ),
    "inactive dropout": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        F.dropout(F.silu(F.linear(x, wg, bg)) * F.linear(x, wu, bu), 0.25, False), w2, b2
    ),
    "no biases": lambda x, wg, bg, wu, bu, w2, b2: F.linear(F.silu(F.linear(x, wg)) * F.linear(x, wu), w2),
    "matmul": lambda x, wg, bg, wu, bu, w2, b2: (F.silu(x @ wg.T + bg) * (x @ wu.mT)) @ w2.t() + b2,
    "in place": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        F.silu(F.linear(x, wg, bg), inplace=True).mul(F.linear(x, wu, bu)), w2, b2
    ),
    "merged, chunk": _chunked,
    "merged, split, gate second": _gate_second,
    "merged, dropout": _dropped,
    "merged, glu": lambda x, wg, bg, wu, bu, w2, b2: F.linear(F.glu(_merged(x, wu, bu, wg, bg)), w2, b2),
    "views between": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        (F.silu(F.linear(x, wg, bg)).unsqueeze(0) * F.linear(x, wu, bu).unsqueeze(0)).squeeze(0), w2, b2
    ),
}


CORPUS = Corpus(_reference, _SPELLINGS, _example_inputs)
