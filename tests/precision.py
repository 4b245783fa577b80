"""The yardstick of every numerical test: against float64, ours may err twice as much as eager PyTorch, plus two ulp."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_exact_as_eager(ours: Tensor, eager: Tensor, exact: Tensor, what: str = "value") -> None:
    """Compares largest errors; the ulp is that of the largest exact magnitude in the dtype under test.

    Args:
        ours: result under test, in the dtype under test.
        eager: the same by plain PyTorch in the same dtype.
        exact: the same by plain PyTorch in float64.
        what: names the value in the message.
    """
    assert exact.dtype is torch.float64, f"{what}: the reference must be float64, got {exact.dtype}"
    assert ours.dtype is eager.dtype, f"{what}: {ours.dtype} instead of {eager.dtype}"
    assert ours.shape == eager.shape == exact.shape, f"{what}: {ours.shape}, {eager.shape}, {exact.shape}"
    if exact.numel() == 0:
        return
    our_error = (ours.detach().double() - exact.detach()).abs().max().item()
    eager_error = (eager.detach().double() - exact.detach()).abs().max().item()
    ulp = torch.finfo(ours.dtype).eps * exact.detach().abs().max().item()
    allowed = 2 * eager_error + 2 * ulp
    assert our_error <= allowed, f"{what}: error {our_error:.3g}, eager's {eager_error:.3g}, allowed {allowed:.3g}"
