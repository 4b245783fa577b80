"""LayerNorm and RMSNorm as models write them out, in plain functions of the sum, a weight and a bias.

All compute in float32 or wider, so that half types are rounded where the original rounds them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-5


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype is torch.float64 else z.to(torch.float32)


def llama(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = _wide(z)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + EPS)
    return w * h.to(z.dtype)


def t5(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance = _wide(z).pow(2).mean(-1, keepdim=True)
    z = z * torch.rsqrt(variance + EPS)
    if w.dtype in (torch.float16, torch.bfloat16):
        z = z.to(w.dtype)
    return w * z


def gemma(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = _wide(z)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + _wide(w))).type_as(z)


def deberta(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = _wide(z)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) / torch.sqrt(variance + EPS)
    return w * h.to(z.dtype) + b


def variance_and_mean(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(_wide(z), dim=-1, correction=0, keepdim=True)
    return ((_wide(z) - mean) * (variance + EPS) ** -0.5 * w + b).to(z.dtype)


def biased_variance(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = _wide(z)
    h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, unbiased=False, keepdim=True) + EPS)
    return (h * w + b).to(z.dtype)


# Called as f(sum, weight, bias).
WRITTEN_OUT: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rms norm of Llama": llama,
    "rms norm of T5": t5,
    "rms norm of Gemma": gemma,
    "layer norm of DeBERTa": deberta,
    "layer norm by var_mean": variance_and_mean,
    "layer norm by var": biased_variance,
}
