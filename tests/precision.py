"""The yardstick of every numerical test: against float64, ours may err twice as much as eager PyTorch, plus two ulp."""

from __future__ import annotations

import torch
from torch import Tensor

from fuse_pass.testing.precision import allowed_error, error


def assert_as_exact_as_eager(
    ours: Tensor, eager: Tensor, exact: Tensor, what: str = "value", *, through_a_model: bool = False
) -> None:
    """Compares largest errors; the ulp is that of the largest exact magnitude in the dtype under test.

    Through a whole model the rounding errors of ours and eager are independent noise of one size, and the largest of a
    few thousand is no measure of that size: there root-mean-square errors are compared.

    Args:
        ours: result under test, in the dtype under test.
        eager: the same by plain PyTorch in the same dtype.
        exact: the same by plain PyTorch in float64.
        what: names the value in the message.
        through_a_model: compare root-mean-square errors instead of largest ones.
    """
    assert exact.dtype is torch.float64, f"{what}: the reference must be float64, got {exact.dtype}"
    assert ours.dtype is eager.dtype, f"{what}: {ours.dtype} instead of {eager.dtype}"
    assert ours.shape == eager.shape == exact.shape, f"{what}: {ours.shape}, {eager.shape}, {exact.shape}"
    if exact.numel() == 0:
        return
    if ours.dtype is torch.float64:  # the reference is no better than what is tested: sums in another order may differ
        scale = exact.detach().abs().max().item()
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13 * scale, msg=lambda text: f"{what}: {text}")
        return
    our_error, eager_error = (error(value, exact, root_mean_square=through_a_model) for value in (ours, eager))
    allowed = allowed_error(eager_error, exact, ours.dtype)
    assert our_error <= allowed, f"{what}: error {our_error:.3g}, eager's {eager_error:.3g}, allowed {allowed:.3g}"
