"""A convolution between integers: what a simulated one computes, by sums of the integers themselves.

    a = clamp(round(x / s_x) + z_x)                        int8; z_x in the padding
    y = (Σ (a − z_x) (c − z_W)) · s_W · s_x + b            over the window and the channels of a group

Shapes: x `[N, C, H, W]`, x_scale and x_zero `[]` or `[N, 1, 1, 1]`, the weight as `ops.quantized_dense` has it with
rows of `kh · kw · C / groups`, channels last, bias `[K]`, y `[N, K, Ho, Wo]` in the dtype of x, and channels last where
x is.

The sums are exact. A NaN spoils the windows that it is in, and no others. The gradients are those of
`F.conv2d(x, Ŵ, bias)`, straight through the rounding of x, or 0 where x is clipped; weight and scales have none.

Without groups the windows are laid out as rows, of 1 byte an element, for the product of integers. With groups, whose
windows are short, PyTorch's own convolution multiplies the integers in float32, in which their sums are exact, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.numerics.tensors import accumulation_dtype, is_nan, without_nan
from fuse_pass.ops.arguments import Arguments
from fuse_pass.ops.fused_op import Gradients, WideInputOp, register, under_transforms
from fuse_pass.ops.plain import are_transformed
from fuse_pass.ops.quantized_dense import InputRounding, IntegerWeight

# Integers that float32 has, all of them.
_EXACT_IN_FLOAT = 2**24


def max_grouped_inner(bits: int, *, has_zero_point: bool) -> int:
    """The largest window of a group whose sums are exact in float32, for codes of so many bits."""
    largest: int = _EXACT_IN_FLOAT // ((2**bits - 1) * (255 if has_zero_point else 128))
    return largest


@dataclass(frozen=True)
class Windows(Arguments):
    """Where the windows of a convolution lie.

    Attributes:
        kernel: height and width.
        stride: of the windows.
        padding: zeros to the left, right, top and bottom, as `F.pad` has them.
        dilation: of the elements of a window.
        groups: into which the channels fall.
    """

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def output_size(self, height: Any, width: Any) -> list[Any]:
        left, right, top, bottom = self.padding
        return [
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(
                (height + top + bottom, width + left + right), self.kernel, self.stride, self.dilation, strict=True
            )
        ]

    def window(self, channels: int) -> int:
        """Elements of a window, in all groups."""
        return self.kernel[0] * self.kernel[1] * channels

    def weight_of(self, rows: Tensor) -> Tensor:
        """`[K, kh · kw · C / groups] → [K, C / groups, kh, kw]`."""
        return rows.view(rows.shape[0], *self.kernel, rows.shape[1] // self.window(1)).permute(0, 3, 1, 2)

    def rows_of_weight(self, weight: Tensor) -> Tensor:
        """The other way."""
        return weight.permute(0, 2, 3, 1).flatten(1)

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.conv2d` of an x that is padded."""
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    def as_rows(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]`, padded, `→ [N · Ho · Wo, kh · kw · C]`."""
        x = x.permute(0, 2, 3, 1).contiguous()
        batch, height, width, channels = x.shape
        if list(self.kernel) == [1, 1]:
            return x[:, :: self.stride[0], :: self.stride[1]].reshape(-1, channels)
        rows, columns = Windows(self.kernel, self.stride, (0, 0, 0, 0), self.dilation, 1).output_size(height, width)
        line = width * channels
        size = [batch, rows, columns, self.kernel[0]]
        strides = [height * line, self.stride[0] * line, self.stride[1] * channels, self.dilation[0] * line]
        if self.dilation[1] == 1:  # a line of the window lies in one piece
            size, strides = [*size, self.kernel[1] * channels], [*strides, 1]
        else:
            size, strides = [*size, self.kernel[1], channels], [*strides, self.dilation[1] * channels, 1]
        return x.as_strided(size, strides).reshape(batch * rows * columns, self.window(channels))

    def has_any(self, is_true: Tensor) -> Tensor:
        """Whether an element of `[N, 1, H, W]`, padded, is True in each window, `[N, 1, Ho, Wo]`."""
        found = F.max_pool2d(is_true.float(), list(self.kernel), list(self.stride), 0, list(self.dilation))
        return found > 0


@dataclass(frozen=True)
class QuantizedConv2d(WideInputOp):
    exact_quotients = True

    x: Tensor
    x_scale: Tensor
    x_zero: Tensor | None
    weight: IntegerWeight
    bias: Tensor | None
    how: InputRounding
    windows: Windows

    def forward(self) -> Tensor:
        return self.by(self.float_sums if self.windows.groups > 1 else self.integer_sums)

    def by(self, sums: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """The result, by one of the two ways to sum."""
        x, weight, windows = self.x, self.weight, self.windows
        q = self.how.integers(x, self.x_scale, self.x_zero)
        # The zero point of what is spoiled may be NaN; padding is what stands for 0.
        zero = None if self.x_zero is None else without_nan(self.x_zero).to(q.dtype)
        is_spoiled = windows.has_any(F.pad(is_nan(q).any(1, keepdim=True), list(windows.padding)))
        q = without_nan(q)
        centred = sums(q, zero)
        wide = accumulation_dtype(torch.promote_types(x.dtype, weight.scale.dtype))
        scale = weight.scale.view(1, -1, 1, 1)
        # In this order nothing overflows that does not overflow in the result.
        y = torch.where(is_spoiled, math.nan, centred.to(wide) * scale * self.x_scale.to(q.dtype))
        y = y if self.bias is None else y + self.bias.view(1, -1, 1, 1)
        return y.to(x.dtype).contiguous(memory_format=_format_of(x))

    def float_sums(self, q: Tensor, zero: Tensor | None) -> Tensor:
        """`Σ (a − z_x) (c − z_W)`, `[N, K, Ho, Wo]`, in the dtype of q; exact where they are not too large for it."""
        weight, windows = self.weight, self.windows
        inner = windows.window(q.shape[1]) // windows.groups
        codes = (weight.codes(inner).to(torch.int32) - weight.zero.unsqueeze(1)).to(q.dtype)
        a = F.pad(q if zero is None else q - zero, list(windows.padding))
        return windows.convolved(a, windows.weight_of(codes))

    def integer_sums(self, q: Tensor, zero: Tensor | None) -> Tensor:
        """The same as int32, without groups."""
        weight, windows = self.weight, self.windows
        height, width = windows.output_size(*q.shape[2:])
        # What is padded is 0 as a − z_x, so that z_x is taken off before, where int8 has room for it.
        a = F.pad(q, list(windows.padding)) if zero is None else _padded(q, zero, list(windows.padding))
        sums = weight.centred_sums(windows.as_rows(a.to(torch.int8)))
        sums = sums.view(q.shape[0], height, width, weight.columns).permute(0, 3, 1, 2)
        return sums if zero is None else sums - zero.to(torch.int32) * weight.sums.view(1, -1, 1, 1)

    def shapes(self) -> Tensor:
        batch, _, height, width = self.x.shape
        size = (batch, self.weight.columns, *self.windows.output_size(height, width))
        return self.x.new_empty(size).contiguous(memory_format=_format_of(self.x))


def _padded(q: Tensor, zero: Tensor, padding: list[int]) -> Tensor:
    """With zero points around: as integers less the zero points, which are 0 there."""
    return F.pad(q - zero, padding) + zero


def _format_of(x: Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


@dataclass(frozen=True)
class QuantizedConv2dGradients(Gradients):
    of = ("x", "bias")

    x: Tensor
    x_scale: Tensor
    x_zero: Tensor | None
    weight: IntegerWeight
    how: InputRounding
    windows: Windows

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        grad, grads = grad_y.to(accumulation_dtype(grad_y.dtype)), {}
        if "x" in needed:
            grad_x = self._of_x(grad)
            grad_x = self.how.passed(grad_x, self.x, self.x_scale, self.x_zero)
            grads["x"] = grad_x.to(self.x.dtype).contiguous()
        if "bias" in needed:
            grads["bias"] = grad.sum((0, 2, 3))
        return grads

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        return self.backward(needed, grad_y)

    def _of_x(self, grad: Tensor) -> Tensor:
        windows = self.windows
        left, right, top, bottom = windows.padding
        height, width = self.x.shape[2:]
        padded = (height + top + bottom, width + left + right)
        # Rows and columns at the end that no window reaches.
        rest = [
            size - (windows.dilation[i] * (windows.kernel[i] - 1) + 1 + (grad.shape[2 + i] - 1) * windows.stride[i])
            for i, size in enumerate(padded)
        ]
        inner = windows.window(self.x.shape[1]) // windows.groups
        weight = windows.weight_of(self.weight.real(inner).to(grad.dtype))
        found = F.conv_transpose2d(grad, weight, None, windows.stride, 0, 0, windows.groups, windows.dilation)
        found = F.pad(found, (0, rest[1], 0, rest[0]))
        return found[:, :, top : top + height, left : left + width]

    def like(self, name: str, grad_y: Tensor) -> Tensor:
        if name == "bias":
            return grad_y.new_empty(self.weight.columns, dtype=accumulation_dtype(grad_y.dtype))
        return torch.empty_like(self.x, memory_format=torch.contiguous_format)


quantized_conv2d_op = register("quantized_conv2d", QuantizedConv2d, QuantizedConv2dGradients)
_under_transforms = under_transforms(quantized_conv2d_op)


def quantized_conv2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    weight: Sequence[Any],
    bias: Tensor | None,
    how: Sequence[Any],
    windows: Sequence[Any],
) -> Tensor:
    """The op, also inside of `torch.func` transforms.

    Args:
        x: `[N, C, H, W]`, floating point.
        x_scale: see the top of this file.
        x_zero: likewise; None for symmetric integers.
        weight: the arguments of an `IntegerWeight`.
        bias: `[K]`.
        how: the arguments of an `InputRounding`.
        windows: the arguments of `Windows`.
    """
    op = _under_transforms if are_transformed(x, bias) else quantized_conv2d_op
    return op(x, x_scale, x_zero, *weight, bias, *how, *windows)  # type: ignore[no-any-return]
