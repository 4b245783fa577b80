"""Dropout → [+ residual] → LayerNorm or RMSNorm as models write it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.patterns.spellings.corpus import Corpus
from fuse_pass.patterns.spellings.written_out_norms import WRITTEN_OUT


def _reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    norm: str = "layer_norm",
    eps: float = 1e-5,
    keep: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """The formula in eager PyTorch, over the last dimension; `keep` is the dropout mask, shaped like x."""
    z = x if keep is None else (torch.where(keep, x / (1 - p), 0.0) if p < 1 else torch.zeros_like(x))
    z = z if residual is None else z + residual
    shape = (z.shape[-1],)
    return F.layer_norm(z, shape, weight, bias, eps) if norm == "layer_norm" else F.rms_norm(z, shape, weight, eps)


def _example_inputs(dtype: torch.dtype = torch.float32, *, rows: tuple[int, ...] = (3, 5)) -> dict[str, Any]:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    return {"x": tensor(*rows, 24), "residual": tensor(*rows, 24), "weight": tensor(24), "bias": tensor(24)}


def _iadd(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = F.dropout(x * 2, 0.25)
    z += r
    return F.layer_norm(z, (24,), w, b)


def _pre_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = r + F.dropout(x, 0.25)
    return z + F.layer_norm(z, (24,), w, b)


def _read_before_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = F.dropout(x, 0.25) + r
    early = torch.tanh(z)
    return F.layer_norm(z, (24,), w, b) * early


def _dropout_read_again(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = F.dropout(x, 0.25)
    return F.layer_norm(z, (24,), w, b) * r + z


def _reshaped_and_read_again(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Swin: the window attention's rows are put back into a sequence, which is the residual stream."""
    stream = (r + F.dropout(x, 0.25)).reshape(1, -1, x.shape[-1])
    return stream, F.layer_norm(stream, (24,), w, b)


def _weight_computed_late(keep: Any) -> Any:
    """Zero-centred weights, `1 + w`, behind a node that keeps the value of the sum and reads it before."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z: Tensor = keep(F.dropout(x, 0.25) + r)
        return F.layer_norm(z, (24,), 1.0 + w.to(z.dtype), b) + z

    return function


def _written_out(norm: Any) -> Any:
    return lambda x, r, w, b: norm(F.dropout(x, 0.25) + r, w, b)


# Called as f(x, residual, weight, bias); each must be found once.
_SPELLINGS: dict[str, Any] = {
    "dropout, norm": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25), (24,), w, b),
    "dropout, add, norm": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25) + r, (24,), w, b),
    "residual first": lambda x, r, w, b: F.layer_norm(r + F.dropout(x, 0.25), (24,), w, b),
    "torch.add": lambda x, r, w, b: F.layer_norm(torch.add(F.dropout(x, 0.25), r), (24,), w, b),
    "method add": lambda x, r, w, b: F.layer_norm(r.add(F.dropout(x, 0.25)), (24,), w, b),
    "iadd": _iadd,
    "the sum is read again": _pre_norm,
    "the sum is read before the norm": _read_before_norm,
    "the dropout is read again": _dropout_read_again,
    "add, norm": lambda x, r, w, b: F.layer_norm(x + r, (24,), w, b),
    "inactive dropout": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25, False) + r, (24,), w, b),
    "inactive dropout after the sum": lambda x, r, w, b: F.layer_norm(F.dropout(x + r, 0.25, False), (24,), w, b),
    "p = 1": lambda x, r, w, b: F.layer_norm(F.dropout(x, 1.0) + r, (24,), w, b),
    "torch.layer_norm": lambda x, r, w, b: torch.layer_norm(F.dropout(x, 0.25) + r, (24,), w, b),
    "no affine": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25) + r, (24,)),
    "no bias": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25) + r, (24,), w),
    "two dimensions": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25) + r, (5, 24)),
    "rms_norm": lambda x, r, w, b: F.rms_norm(F.dropout(x, 0.25) + r, (24,), w, 1e-6),
    "rms_norm, default eps": lambda x, r, w, b: F.rms_norm(x + r, (24,)),
    "broadcast residual": lambda x, r, w, b: F.layer_norm(F.dropout(x, 0.25) + r[:1], (24,), w, b),
    "broadcast operand": lambda x, r, w, b: F.layer_norm(x[0] + r, (24,), w, b),
    "reshaped": lambda x, r, w, b: F.layer_norm((F.dropout(x, 0.25) + r).view(-1, 24), (24,), w, b),
    "reshaped and read again": _reshaped_and_read_again,
    "cast": lambda x, r, w, b: F.layer_norm((F.dropout(x, 0.25) + r).double(), (24,)),
    "weight computed behind a cast": _weight_computed_late(lambda z: z.to(z.dtype)),
    "weight computed behind an inactive dropout": _weight_computed_late(lambda z: F.dropout(z, 0.0)),
    "weight computed behind a view": _weight_computed_late(lambda z: z.contiguous().reshape(-1, 24)),
    **{name: _written_out(norm) for name, norm in WRITTEN_OUT.items()},
}


CORPUS = Corpus(_reference, _SPELLINGS, _example_inputs)
