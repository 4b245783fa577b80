"""Convolutions and transposed convolutions with quantised operands, in one to three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.quantization.layers.base import QuantizedLayer, simulated


class _Convolution(QuantizedLayer):
    """The constructor that all share: that of the seed, then every other argument of the `torch.nn` layer by name."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        exp_bits: int = 5,
        sig_bits: int = 10,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        rmode: int | str = 1,
        *,
        spec: QuantSpec | None = None,
        **of_torch: Any,
    ) -> None:
        """See the `torch.nn` layer of the same name.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            kernel_size: size of the kernel.
            exp_bits: exponent bits of an IEEE-like format, 2…11.
            sig_bits: its explicit fraction bits, 1…52.
            stride: step of the kernel.
            padding: zeros around the input.
            rmode: rounding mode, by number 0…9 or name.
            spec: what is quantised and how, instead of the format above.
            **of_torch: `dilation`, `groups`, `bias`, `padding_mode`, `output_padding`, `device` and `dtype`.
        """
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, **of_torch)
        self.spec = spec or simulated(exp_bits, sig_bits, rmode)


class _Forward(_Convolution):
    weight: Tensor
    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return self._output(self._conv_forward(self._input(input), self._weight(self.weight), self._bias(self.bias)))


class QuantizedConv1d(_Forward, nn.Conv1d):
    """`nn.Conv1d`, `[N, C_in, L] → [N, C_out, L_out]`, with quantised input, weight, bias and output."""

    float_type = nn.Conv1d


class QuantizedConv2d(_Forward, nn.Conv2d):
    """`nn.Conv2d`, `[N, C_in, H, W] → [N, C_out, H_out, W_out]`, with quantised input, weight, bias and output."""

    float_type = nn.Conv2d


class QuantizedConv3d(_Forward, nn.Conv3d):
    """`nn.Conv3d`, `[N, C_in, D, H, W] → [N, C_out, …]`, with quantised input, weight, bias and output."""

    float_type = nn.Conv3d


class _Transposed(_Convolution):
    convolve: ClassVar[Callable[..., Tensor]]
    dimensions: ClassVar[int]

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for {type(self).__name__}")
        extra = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, self.dimensions, self.dilation
        )
        y: Tensor = type(self).convolve(
            self._input(input), self._weight(self.weight), self._bias(self.bias),
            self.stride, self.padding, extra, self.groups, self.dilation,
        )  # fmt: skip
        result: Tensor = self._output(y)
        return result


class QuantizedConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with quantised input, weight, bias and output."""

    float_type = nn.ConvTranspose1d
    convolve = staticmethod(F.conv_transpose1d)
    dimensions = 1


class QuantizedConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with quantised input, weight, bias and output."""

    float_type = nn.ConvTranspose2d
    convolve = staticmethod(F.conv_transpose2d)
    dimensions = 2


class QuantizedConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with quantised input, weight, bias and output."""

    float_type = nn.ConvTranspose3d
    convolve = staticmethod(F.conv_transpose3d)
    dimensions = 3
