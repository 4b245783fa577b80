"""The yardstick of every numerical test: against float64, ours may err twice as much as eager PyTorch, plus two ulp."""

from __future__ import annotations

import math

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


_UNIT_ROUNDOFF = 2.0**-24  # of float32
_CHANCE = 1e-6


def assert_sums_as_exact_as_one_by_one(
    ours: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, relu: bool = False, block: int | None = None
) -> None:
    """Compares the errors of a float32 `a [m, k] @ b [n, k].T + bias` with what rounding alone explains.

    How a library orders a long sum depends on the processor, and so does its error: eager's is no measure of ours. The
    bound is that of an order: products added one by one, in blocks whose sums are added one by one.

    Each operation rounds its result s, up or down without preference, by at most u·|s|, u = 2**-24. That is an error of
    mean 0 and variance at most (u·s)²/3, and those of different operations are independent. The variance of a result
    is so at most u²/3 times the sum of all squared partial sums, which are computed here from the data. In no other
    order are partial sums of random data larger on the whole: wherever a sum is split, they are shorter.

    The mean square of n normal errors exceeds its expectation by more than 2·sqrt(t/n) + 2·t/n of it with a chance
    below exp(-t) (Laurent and Massart, 2000). Nothing here was measured: it holds wherever float32 is that of IEEE.

    Args:
        ours: result under test.
        a: of any strides.
        b: of any strides.
        bias: of any strides.
        relu: a ReLU follows, which makes no error larger.
        block: number of products in a block; None for one block.
    """
    wide_a, wide_b = a.double(), b.double()
    exact = wide_a @ wide_b.t() + (0 if bias is None else bias.double())
    blocks = 1 if block is None else round(a.shape[1] / block)
    squares, total = torch.zeros_like(exact), torch.zeros_like(exact)
    for part_a, part_b in zip(wide_a.tensor_split(blocks, 1), wide_b.tensor_split(blocks, 1), strict=True):
        products = part_a[:, None, :] * part_b
        partial_sums = products.cumsum(-1)
        total = total + partial_sums[..., -1]
        squares += products.square().sum(-1) + partial_sums.square().sum(-1) + total.square()
    squares += exact.square()  # the bias
    share = -math.log(_CHANCE) / exact.numel()
    mean_square = _UNIT_ROUNDOFF**2 * squares.mean().item() / 3
    allowed = math.sqrt(mean_square * (1 + 2 * math.sqrt(share) + 2 * share))
    found = error(ours, exact.relu() if relu else exact, root_mean_square=True)
    assert found <= allowed, f"root mean square error {found:.3g}, allowed {allowed:.3g}"
