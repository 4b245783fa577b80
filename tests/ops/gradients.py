"""Value and gradients of an op, against its reference in the same dtype and in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.precision import assert_as_exact_as_eager

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS: dict[str, tuple[int, ...]] = {
    "rank 1": (),
    "rank 2": (5,),
    "rank 3": (3, 5),
    "rank 4": (2, 3, 5),
    "empty": (0, 5),
}


def wide(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v is None else v.detach().double().requires_grad_(v.requires_grad) for k, v in values.items()}


def run(function: Callable[..., Tensor], values: dict[str, Any], *arguments: Any) -> dict[str, Tensor]:
    """The value and the gradient of every tensor that wants one."""
    y = function(values, *arguments)
    leaves = {name: v for name, v in values.items() if v is not None and v.requires_grad}
    torch.manual_seed(1)
    grad_y = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    found = torch.autograd.grad(y, list(leaves.values()), grad_y, allow_unused=True)
    grads = [torch.zeros_like(v) if g is None else g for v, g in zip(leaves.values(), found, strict=True)]
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_gradients_exact(
    ours: Callable[..., Tensor], reference: Callable[..., Tensor], values: dict[str, Any], *arguments: Any
) -> None:
    """Compares `ours(values, *arguments)` and every gradient with the reference."""
    result, eager = run(ours, values, *arguments), run(reference, values, *arguments)
    exact = run(reference, wide(values), *arguments)
    for name, value in result.items():
        assert_as_exact_as_eager(value, eager[name], exact[name], name)
