"""Linear → activation → [dropout] → Linear as models write it."""

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
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    arguments: tuple[float, ...] = (),
    act_weight: Tensor | None = None,
    keep: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """The formula in eager PyTorch; `keep` is the dropout mask, shaped like the hidden value."""
    a = ACTIVATIONS[activation].forward(F.linear(x, weight1, bias1), arguments, act_weight)
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
        "weight1": parameter(24, 8),
        "bias1": parameter(24) if bias else None,
        "weight2": parameter(16, 24),
        "bias2": parameter(16) if bias else None,
    }


def _view_between(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    h = F.gelu(F.linear(x, w1, b1)).view(-1, w1.shape[0]).view(*x.shape[:-1], w1.shape[0])
    return F.linear(h, w2, b2)


def _conv1d(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """GPT-2's Conv1D: addmm on a flattened input, weights stored `[in, out]`."""
    v1, v2 = w1.t().contiguous(), w2.t().contiguous()
    h = torch.addmm(b1, x.view(-1, x.size(-1)), v1).view((*x.shape[:-1], v1.shape[1]))
    a = 0.5 * h * (1.0 + torch.tanh(0.7978845608028654 * (h + 0.044715 * torch.pow(h, 3.0))))
    return torch.addmm(b2, a.view(-1, a.size(-1)), v2).view((*x.shape[:-1], v2.shape[1]))


def _in_place(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.dropout(F.relu(F.linear(x, w1, b1), inplace=True), 0.0, True, True), w2, b2)


# Called as f(x, weight1, bias1, weight2, bias2); each must be found once.
_SPELLINGS: dict[str, Any] = {
    "linear, gelu, linear": lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
    "gelu tanh": lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2),
    "dropout": lambda x, w1, b1, w2, b2: F.linear(F.dropout(F.gelu(F.linear(x, w1, b1)), 0.25), w2, b2),
    "inactive dropout": lambda x, w1, b1, w2, b2: F.linear(F.dropout(F.gelu(F.linear(x, w1, b1)), 0.25, False), w2, b2),
    "no biases": lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1)), w2),
    "matmul": lambda x, w1, b1, w2, b2: F.gelu(x @ w1.T + b1) @ w2.t() + b2,
    "matmul, bias first": lambda x, w1, b1, w2, b2: b2 + torch.matmul(F.gelu(b1 + x.matmul(w1.mT)), w2.transpose(0, 1)),
    "matmul, permute, no biases": lambda x, w1, b1, w2, b2: torch.matmul(F.gelu(x @ w1.permute(1, 0)), w2.T),
    "addmm (Conv1D)": _conv1d,
    "einsum": lambda x, w1, b1, w2, b2: (
        torch.einsum("oi,...i->...o", w2, F.gelu(torch.einsum("...i,oi->...o", x, w1) + b1)) + b2
    ),
    "einsum, weights stored [in, out]": lambda x, w1, b1, w2, b2: torch.einsum(
        "...f,fd->...d", F.gelu(torch.einsum("...d,df->...f", [x, w1.t()])), w2.mT
    ),
    "einsum of letters": lambda x, w1, b1, w2, b2: torch.einsum(
        "btf, df -> btd", F.gelu(torch.einsum("btd, fd -> btf", x, w1)), w2
    ),
    "views between": _view_between,
    "in place": _in_place,
    "relu": lambda x, w1, b1, w2, b2: F.linear(torch.relu(F.linear(x, w1, b1)), w2, b2),
    "relu method": lambda x, w1, b1, w2, b2: F.linear(F.linear(x, w1, b1).relu(), w2, b2),
    "leaky_relu": lambda x, w1, b1, w2, b2: F.linear(F.leaky_relu(F.linear(x, w1, b1), 0.2), w2, b2),
    "prelu": lambda x, w1, b1, w2, b2: F.linear(F.prelu(F.linear(x, w1, b1), b1[:1]), w2, b2),
    "elu": lambda x, w1, b1, w2, b2: F.linear(F.elu(F.linear(x, w1, b1), 0.7), w2, b2),
    "selu": lambda x, w1, b1, w2, b2: F.linear(F.selu(F.linear(x, w1, b1)), w2, b2),
    "silu": lambda x, w1, b1, w2, b2: F.linear(F.silu(F.linear(x, w1, b1)), w2, b2),
    "mish": lambda x, w1, b1, w2, b2: F.linear(F.mish(F.linear(x, w1, b1)), w2, b2),
    "relu6": lambda x, w1, b1, w2, b2: F.linear(F.relu6(F.linear(x, w1, b1)), w2, b2),
    "hardtanh": lambda x, w1, b1, w2, b2: F.linear(F.hardtanh(F.linear(x, w1, b1), -0.5, 0.7), w2, b2),
    "hardsigmoid": lambda x, w1, b1, w2, b2: F.linear(F.hardsigmoid(F.linear(x, w1, b1)), w2, b2),
    "hardswish": lambda x, w1, b1, w2, b2: F.linear(F.hardswish(F.linear(x, w1, b1)), w2, b2),
    "sigmoid": lambda x, w1, b1, w2, b2: F.linear(torch.sigmoid(F.linear(x, w1, b1)), w2, b2),
    "tanh": lambda x, w1, b1, w2, b2: F.linear(F.linear(x, w1, b1).tanh(), w2, b2),
    "softplus": lambda x, w1, b1, w2, b2: F.linear(F.softplus(F.linear(x, w1, b1), 2.0, 3.0), w2, b2),
    "squared relu": lambda x, w1, b1, w2, b2: F.linear(torch.square(F.relu(F.linear(x, w1, b1))), w2, b2),
    "star relu": lambda x, w1, b1, w2, b2: F.linear(b1[:1] * F.relu(F.linear(x, w1, b1)) ** 2 + b1[1:2], w2, b2),
    "hardswish written out": lambda x, w1, b1, w2, b2: F.linear(
        (lambda h: h * F.relu6(h + 3) / 6)(F.linear(x, w1, b1)), w2, b2
    ),
    "gelu written out": lambda x, w1, b1, w2, b2: F.linear(
        (lambda h: h * 0.5 * (1.0 + torch.erf(h / 1.4142135623730951)))(F.linear(x, w1, b1)), w2, b2
    ),
    "gelu tanh written out with products": lambda x, w1, b1, w2, b2: F.linear(
        (lambda h: 0.5 * h * (1 + (h * 0.7978845608 * (1 + 0.044715 * h * h)).tanh()))(F.linear(x, w1, b1)), w2, b2
    ),
    "quick gelu written out": lambda x, w1, b1, w2, b2: F.linear(
        (lambda h: h * torch.sigmoid(1.702 * h))(F.linear(x, w1, b1)), w2, b2
    ),
    "silu written out": lambda x, w1, b1, w2, b2: F.linear((lambda h: h.sigmoid().mul(h))(F.linear(x, w1, b1)), w2, b2),
    "mish written out": lambda x, w1, b1, w2, b2: F.linear(
        (lambda h: h * torch.tanh(F.softplus(h)))(F.linear(x, w1, b1)), w2, b2
    ),
}


CORPUS = Corpus(_reference, _SPELLINGS, _example_inputs)
