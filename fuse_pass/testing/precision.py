"""The yardstick of every numerical comparison: against float64, ours may err twice as much as eager, plus two ulp."""

from __future__ import annotations

import torch
from torch import Tensor


def error(value: Tensor, exact: Tensor, *, root_mean_square: bool = False) -> float:
    """The largest (or root-mean-square) distance of `value` from `exact`, in float64; 0 for empty tensors."""
    if exact.numel() == 0:
        return 0.0
    distance = value.detach().double() - exact.detach()
    return (distance.square().mean().sqrt() if root_mean_square else distance.abs().max()).item()


def allowed_error(eager_error: float, exact: Tensor, dtype: torch.dtype) -> float:
    """What a result in `dtype` may err; the ulp is that of the largest exact magnitude."""
    largest = exact.detach().abs().max().item() if exact.numel() else 0.0
    return 2 * eager_error + 2 * torch.finfo(dtype).eps * largest
