"""Layer norms whose rows are centred before PyTorch sums them.

PyTorch's kernel for the gradient on a CPU takes the mean out of sums of the rows themselves, times 1 / deviation³: for
a constant row of 1e12 and an epsilon of 1e-12 nothing of the gradient is left, in float64 either (0 where the formula
gives 1e6), and that of the weight is noise. The norm of a row is that of the row less any number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fuse_pass.inductor import debugging

_aten = torch.ops.aten


class CentredNorms(debugging.TorchDispatchMode):
    """Forward is of the differences from the first element of a row, backward of those from its mean."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _aten.native_layer_norm.default and args[0].numel():
            return _forward(func, *args)
        if func is _aten.native_layer_norm_backward.default and args[1].numel():
            grad, x, shape, mean, *rest = args
            return func(grad, x - mean, shape, torch.zeros_like(mean), *rest)
        return func(*args, **(kwargs or {}))


def _forward(func: Any, x: Tensor, shape: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As PyTorch's: the result, and mean and 1 / deviation, which backward reads."""
    first = x
    for dim in range(x.dim() - len(shape), x.dim()):
        first = first.narrow(dim, 0, 1)
    y, mean, rstd = func(x - first, shape, *rest)
    return y, mean + first, rstd
