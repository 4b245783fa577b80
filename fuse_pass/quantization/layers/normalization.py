"""Normalisations with quantised input, parameters and output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.quantization.layers.base import ByFormat, QuantizedLayer, simulated


class QuantizedLayerNorm(QuantizedLayer, nn.LayerNorm):
    """`nn.LayerNorm` of the quantised input, with quantised weight, bias and output.

    Args:
        normalized_shape: size, or sizes, of the normalised last dimension(s).
        exp_bits: exponent bits of an IEEE-like format, 2…11.
        sig_bits: its explicit fraction bits, 1…52.
        eps: added to the variance.
        rmode: rounding mode, by number 0…9 or name.
        elementwise_affine: whether there is a weight (and a bias).
        bias: whether there is a bias, if there is a weight.
        spec: what is quantised and how, instead of the format above.
        device: where the parameters are created.
        dtype: their dtype.
    """

    float_type = nn.LayerNorm

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        exp_bits: int = 5,
        sig_bits: int = 10,
        eps: float = 1e-5,
        rmode: int | str = 1,
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        spec: QuantSpec | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias=bias, device=device, dtype=dtype)
        self.spec = spec or simulated(exp_bits, sig_bits, rmode)

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self._weight(self.weight)
        y = F.layer_norm(self._input(input), self.normalized_shape, weight, self._bias(self.bias), self.eps)
        return self._output(y)


QuantizedLinearNorm = QuantizedLayerNorm


class QuantizedRMSNorm(ByFormat, nn.RMSNorm):
    """`nn.RMSNorm` (1910.07467) with quantised input, weight and output; format by keywords or `spec`."""

    float_type = nn.RMSNorm

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self._weight(self.weight)
        return self._output(F.rms_norm(self._input(x), self.normalized_shape, weight, self.eps))


class QuantizedGroupNorm(ByFormat, nn.GroupNorm):
    """`nn.GroupNorm` with quantised input, weight, bias and output; format by keywords or `spec`."""

    float_type = nn.GroupNorm

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self._weight(self.weight)
        return self._output(F.group_norm(self._input(input), self.num_groups, weight, self._bias(self.bias), self.eps))


class _InstanceNorm(ByFormat):
    def _apply_instance_norm(self: Any, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self._weight(self.weight)
        y = F.instance_norm(
            self._input(input), self.running_mean, self.running_var, weight, self._bias(self.bias),
            self.training or not self.track_running_stats, 0.0 if self.momentum is None else self.momentum, self.eps,
        )  # fmt: skip
        result: Tensor = self._output(y)
        return result


class QuantizedInstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`nn.InstanceNorm1d` with quantised input, weight, bias and output; format by keywords or `spec`."""

    float_type = nn.InstanceNorm1d


class QuantizedInstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`nn.InstanceNorm2d` with quantised input, weight, bias and output; format by keywords or `spec`."""

    float_type = nn.InstanceNorm2d


class QuantizedInstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`nn.InstanceNorm3d` with quantised input, weight, bias and output; format by keywords or `spec`."""

    float_type = nn.InstanceNorm3d


class _BatchNorm(QuantizedLayer):
    """The constructor of the seed; running statistics are kept in floating point, as those of `torch.nn`."""

    def __init__(
        self,
        num_features: int,
        exp_bits: int = 5,
        sig_bits: int = 10,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        rmode: int | str = 1,
        *,
        spec: QuantSpec | None = None,
        **of_torch: Any,
    ) -> None:
        """See the `torch.nn` layer of the same name.

        Args:
            num_features: number of channels.
            exp_bits: exponent bits of an IEEE-like format, 2…11.
            sig_bits: its explicit fraction bits, 1…52.
            eps: added to the variance.
            momentum: weight of the batch in the running statistics; None for their mean over all batches.
            rmode: rounding mode, by number 0…9 or name.
            spec: what is quantised and how, instead of the format above.
            **of_torch: `affine`, `track_running_stats`, `device` and `dtype`.
        """
        super().__init__(num_features, eps, momentum, **of_torch)
        self.spec = spec or simulated(exp_bits, sig_bits, rmode)

    def forward(self: Any, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        uses_batch = self.training or (self.running_mean is None and self.running_var is None)
        x, weight = self._input(input), None if self.weight is None else self._weight(self.weight)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None and torch.compiler.is_compiling():
                cumulative: Tensor = self._with_cumulative_statistics(x, weight)
                return cumulative
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        keeps_statistics = not self.training or self.track_running_stats
        y = F.batch_norm(
            x,
            self.running_mean if keeps_statistics else None,
            self.running_var if keeps_statistics else None,
            weight, self._bias(self.bias), uses_batch, factor, self.eps,
        )  # fmt: skip
        result: Tensor = self._output(y)
        return result

    def _with_cumulative_statistics(self: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        """`momentum=None` in a graph, which cannot hold a factor that is a Python number and changes with every call.

        The running statistics are those of eager up to the rounding of this batch's own; the output is the same.
        """
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(x, mean, var, weight, self._bias(self.bias), True, 1.0, self.eps)
        factor = 1.0 / self.num_batches_tracked.to(mean.dtype)
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(var, factor)
        result: Tensor = self._output(y)
        return result


class QuantizedBatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d`, `[N, C]` or `[N, C, L]`, with quantised input, weight, bias and output."""

    float_type = nn.BatchNorm1d


class QuantizedBatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d`, `[N, C, H, W]`, with quantised input, weight, bias and output."""

    float_type = nn.BatchNorm2d


class QuantizedBatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d`, `[N, C, D, H, W]`, with quantised input, weight, bias and output."""

    float_type = nn.BatchNorm3d
