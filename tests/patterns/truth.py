"""What a function must yield: eager PyTorch in the dtype under test and in float64, with the masks of the fused op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fuse_pass.numerics import random_bits
from fuse_pass.report import Decline, Reason, Report
from fuse_pass.testing.precision import allowed_error, error
from tests.capture import Captured, capture
from tests.precision import assert_as_exact_as_eager

SEED = 1234


class SameDropout(TorchFunctionMode):
    """Eager PyTorch with the dropout masks of a fused graph that draws one seed after `torch.manual_seed(SEED)`.

    The mask depends on the flat index of an element alone, so that any split into rows and columns gives the same.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.seed = torch.ops.fuse_pass.seed(device=torch.device("cpu"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.dropout, torch.dropout):
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        keep = random_bits.keep_mask(self.seed, x.numel(), 1, p).view(x.shape)
        dropped = torch.where(keep, x * (1 / (1 - p)) if p < 1 else x, 0.0)
        return x.copy_(dropped) if inplace else dropped


@dataclass
class Result:
    """The values of a call and the gradient of every tensor argument (None where it has none)."""

    values: list[Tensor]
    grads: list[Tensor | None]


def leaves(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Fresh copies of the arguments, optionally in another dtype, that gradients can be taken of."""
    return [
        a.detach().to(dtype or a.dtype, copy=True).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in arguments.values()
    ]


def with_grads(function: Callable[..., Any], arguments: list[Any]) -> Result:
    """Calls the function and pulls fixed, uneven gradients back through all that it returns."""
    output = function(*arguments)
    values = list(output) if isinstance(output, tuple) else [output]
    roots = [value for value in values if value.requires_grad]
    torch.autograd.backward(roots, [_uneven(value) for value in roots])
    return Result([value.detach() for value in values], [a.grad if isinstance(a, Tensor) else None for a in arguments])


def _uneven(like: Tensor) -> Tensor:
    return torch.linspace(-1.0, 2.0, like.numel(), dtype=torch.float64).view(like.shape).to(like.dtype)


def eager(function: Callable[..., Any], arguments: list[Any]) -> Result:
    """The function in eager PyTorch, dropping what a fused graph drops after `torch.manual_seed(SEED)`."""
    with SameDropout():
        return with_grads(function, arguments)


def assert_agrees(ours: Result, of_eager: Result, exact: Result) -> None:
    """Values and gradients against the yardstick of `tests.precision`."""
    for i, (value, eager_value, exact_value) in enumerate(zip(ours.values, of_eager.values, exact.values, strict=True)):
        # A function that casts to float64 itself does so after rounding its inputs; eager is then the truth.
        truth = eager_value if value.dtype is torch.float64 else exact_value.double()
        assert_as_exact_as_eager(value, eager_value, truth, f"value {i}")
    largest = max((_largest(grad) for grad in exact.grads if grad is not None), default=0.0)
    for i, (grad, eager_grad, exact_grad) in enumerate(zip(ours.grads, of_eager.grads, exact.grads, strict=True)):
        assert (grad is None) == (eager_grad is None), f"gradient of argument {i}: {grad} where eager has {eager_grad}"
        if grad is None or eager_grad is None or exact_grad is None:
            continue
        if _largest(exact_grad) < 1e-12 * largest:
            # Its summands cancel, as those of a number that is added to a whole row before a LayerNorm: it is 0, which
            # has no ulp, and what float64 leaves of it is rounding, or 0 by luck. The ulp is that of the summands.
            allowed = allowed_error(error(eager_grad, exact_grad), torch.tensor(largest), grad.dtype)
            assert error(grad, exact_grad) <= allowed, f"gradient of argument {i}, which is 0: {grad}"
        else:
            assert_as_exact_as_eager(grad, eager_grad, exact_grad, f"gradient of argument {i}")


def _largest(grad: Tensor) -> float:
    return grad.abs().max().item() if grad.numel() else 0.0


def fused(function: Callable[..., Any], arguments: list[Any], **options: Any) -> tuple[Captured, Result]:
    """The function through the pass, drawing the seed that `eager` reproduces; `options` go to `capture`."""
    holder: list[Captured] = []

    def call(*values: Any) -> Any:
        torch.manual_seed(SEED)
        holder.append(capture(function, *values, **options))
        return holder[0].output

    result = with_grads(call, arguments)
    return holder[0], result


def assert_fused_like_eager(
    function: Callable[..., Any], inputs: dict[str, Any], *, counts: dict[str, int] | None = None, **options: Any
) -> Captured:
    """Captures the function and compares values and gradients with eager; `counts` are the expected matches."""
    found, ours = fused(function, leaves(inputs), **options)
    assert_agrees(ours, eager(function, leaves(inputs)), eager(function, leaves(inputs, torch.float64)))
    if counts is not None:
        assert found.report.counts() == counts, f"expected {counts}: {found.report}"
    return found


def assert_declines(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    reason: Reason,
    node: str,
    *,
    counts: dict[str, int] | None = None,
    **options: Any,
) -> list[Decline]:
    """One kind of decline, blamed on the node whose name begins with `node`, and a result that equals eager's."""
    found = assert_fused_like_eager(function, inputs, counts=counts or {}, **options)
    assert_blames(found.report, reason, node)
    return found.report.declines


def assert_blames(report: Report, reason: Reason, node: str) -> None:
    assert report.declines, "expected a decline"
    assert {decline.reason for decline in report.declines} == {reason}, str(report)
    assert any(decline.node.startswith(node) for decline in report.declines), str(report)
    assert all(decline.detail for decline in report.declines)
