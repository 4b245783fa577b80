"""Eager PyTorch with its float32 products computed by oneDNN.

fuse_pass sends a product to the library that is faster here. MKL and oneDNN add in different orders, and for a weight
row that meets a constant row of inputs the errors of one order do not cancel where those of the other do: over 1000
columns oneDNN was found four times as far off as MKL. Each is a right answer that we did not write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fuse_pass.gemm import onednn
from fuse_pass.inductor import compat, debugging

_aten = torch.ops.aten


class OneDNNProducts(debugging.TorchDispatchMode):
    """Every `mm` and `addmm` of float32 matrices on the CPU is computed by oneDNN, in eager PyTorch."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _aten.mm.default and _is_ours(*args):
            return _product(args[0], args[1], None)
        if func is _aten.addmm.default and not kwargs and _is_bias(args[0]) and _is_ours(*args[1:]):
            return _product(args[1], args[2], args[0])
        return func(*args, **(kwargs or {}))


def _is_ours(a: Tensor, b: Tensor) -> bool:
    is_float32 = a.dtype is b.dtype is torch.float32 and a.device.type == b.device.type == "cpu"
    return is_float32 and 0 not in (*a.shape, *b.shape) and onednn.multiplies(torch.float32)


def _is_bias(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and tensor.is_contiguous()


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    linear = compat.onednn_linear()
    assert linear is not None  # `multiplies` has looked
    result: Tensor = linear(a.contiguous(), b.t().contiguous(), bias, "none", [], "")
    return result
