"""Convolutions that hold their weight in few bits, for inference; made by `fuse_pass.pack`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.numerics.formats import Granularity, as_format
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.ops.packed_dense import PackedWeight
from fuse_pass.ops.quantized_conv2d import Windows, max_grouped_inner, quantized_conv2d
from fuse_pass.quantization import integer_weights
from fuse_pass.quantization.integer_weights import width_of
from fuse_pass.quantization.layers.convolution import QuantizedConv2d
from fuse_pass.quantization.layers.packed import PackedLayer
from fuse_pass.quantization.layers.packed_quantized import PackedQuantizedLayer, content_of
from fuse_pass.quantization.packing import PackSpec, packed

_IMAGE = Granularity("channel", axis=0)
# What "int8" says of a convolution in floating point: a scale for each image, and one for each channel of the result.
_INT8 = Site(as_format("int8"), granularity=_IMAGE, scale="dynamic")
INT8_SPEC = QuantSpec(input=_INT8, weight=_INT8)


class _PackedConvolution(PackedLayer):
    """Everything but how it multiplies: rows of the packed weight are `kh · kw · C / groups` long, channels last."""

    bias: Tensor | None

    def _take_windows(self, conv: nn.Conv2d) -> None:
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self.windows = windows_of(conv)
        self.bias = conv.bias

    @property
    def _inner(self) -> int:
        return self.windows.window(self.in_channels) // self.groups

    def _real_rows(self, inner: int) -> Tensor:
        raise NotImplementedError

    def _convolved(self, x: Tensor, padding: list[int]) -> Tensor:
        """`[N, C, H, W] → [N, K, Ho, Wo]`; `padding` is in zeros, or done."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W] → [N, K, Ho, Wo]`, without N as well, in the dtype of x."""
        self._check_input(x)
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        padding = list(self.windows.padding)
        if self.padding_mode != "zeros":
            batch, padding = F.pad(batch, padding, self.padding_mode), [0, 0, 0, 0]
        y = self._convolved(batch, padding)
        return y if x.dim() == 4 else y.squeeze(0)

    def _check_input(self, x: Tensor) -> None:
        fits = x.dim() in (3, 4) and x.is_floating_point() and x.shape[-3] == self.in_channels
        if not fits or x.device != self.words.device:
            raise RuntimeError(
                f"{type(self).__name__}: expected a floating-point x [N, {self.in_channels}, H, W], or one without N, "
                f"on {self.words.device}, got {x.dtype} {list(x.shape)} on {x.device}"
            )

    def real_weight(self) -> Tensor:
        return self.windows.weight_of(self._real_rows(self._inner))

    @torch.no_grad()
    def to_float(self) -> nn.Conv2d:
        """An `nn.Conv2d` with the real numbers that the codes stand for as its weight, and the same bias."""
        names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
        settings: dict[str, Any] = {name: getattr(self, name) for name in names.split()}
        conv = nn.Conv2d(**settings, bias=False, device="meta")
        weight = self.real_weight().to(torch.float32 if self.bias is None else self.bias.dtype)
        conv.weight = nn.Parameter(weight.contiguous())
        conv.bias = self.bias
        return conv.train(self.training)

    def extra_repr(self) -> str:
        size = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{size}, padding={self.padding}, groups={self.groups}, bias={self.bias is not None}, {self.spec}"


class PackedConv2d(_PackedConvolution):
    """`[N, C, H, W] → [N, K, Ho, Wo]` by a weight of 8 or 4 bits, unpacked in every call; the input is not rounded.

    Groups that share a scale are consecutive elements of a window, channels last. The weight is no Parameter: inputs
    and the bias get gradients, the weight has none. `to_float()` gives an `nn.Conv2d` back. The state dict is that of a
    `PackedLinear`.

    Args:
        conv: whose weight is packed, with the same bias Parameter.
        spec: how; one whose inputs stay as they are.

    Raises:
        ValueError: see `packing.packed`.
    """

    shift: Tensor | None

    def __init__(self, conv: nn.Conv2d, spec: PackSpec) -> None:
        weight = packed(windows_of(conv).rows_of_weight(conv.weight.detach()), spec)
        super().__init__(spec.to_bytes(), weight.words)
        self.spec = spec
        self._take_windows(conv)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("shift", weight.shift)
        self._register_table(spec.table)
        self.train(conv.training)

    def _real_rows(self, inner: int) -> Tensor:
        spec = self.spec
        weight = PackedWeight(self.words, self.scale, self.shift, self.table, spec.kind, spec.bits, self.out_channels)
        return weight.real(inner)

    def _convolved(self, x: Tensor, padding: list[int]) -> Tensor:
        return _by_real_weight(self, x, padding)

    def _described(self, content: bytes) -> object:
        return PackSpec.from_bytes(content)


class PackedQuantizedConv2d(PackedQuantizedLayer, _PackedConvolution):
    """`[N, C, H, W] → [N, K, Ho, Wo]`: what a `QuantizedConv2d` computes, by sums of integers.

    The input is rounded to integers as the site of the `QuantizedConv2d` says, with the scale that it has or one of
    each image or of all; see `fuse_pass.ops.quantized_conv2d`. Without a site for the input the weight alone is in few
    bits. Results are those of the `QuantizedConv2d` up to the rounding of sums, as a `PackedQuantizedLinear` has them.

    Raises:
        ValueError: a `QuantizedConv2d` for which `problem_of_conv2d` names a problem, or a weight with NaN or infinity.
    """

    def __init__(self, layer: QuantizedConv2d) -> None:
        problem = problem_of_conv2d(layer)
        if problem:
            raise ValueError(f"pack: {problem}")
        weight = integer_weights.integer_weight(layer, windows_of(layer).rows_of_weight)
        super().__init__(content_of(layer.spec), weight.words)
        self._take_windows(layer)
        self.bias = integer_weights.rounded_bias(layer)
        self._take_sites(layer, weight, layer.out_channels)

    def _convolved(self, x: Tensor, padding: list[int]) -> Tensor:
        if self._quantizer is None:
            return self._rounded(_by_real_weight(self, x, padding))
        scale, zero_point, how = self._input_qparams(x)
        windows = self.windows
        settings = (windows.kernel, windows.stride, padding, windows.dilation, windows.groups)
        return self._rounded(quantized_conv2d(x, scale, zero_point, self._weight(), self.bias, how, settings))


def _by_real_weight(layer: _PackedConvolution, x: Tensor, padding: list[int]) -> Tensor:
    weight = layer.real_weight().to(x.dtype).contiguous()
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return layer.windows.convolved(F.pad(x, padding) if any(padding) else x, weight, bias)


def problem_of_conv2d(layer: QuantizedConv2d) -> str:
    """Why a layer cannot be packed to what it computes; empty where it can."""
    spec: Any = layer.spec
    inner = layer.weight[0].numel() if layer.weight.shape[0] else 0
    problem = integer_weights.problem_of(layer, inner, (Granularity("tensor"), _IMAGE), (Granularity("tensor"), _IMAGE))
    if problem or layer.groups == 1 or spec.input is None:
        return problem
    largest = max_grouped_inner(width_of(spec.weight.format), has_zero_point=spec.input.format.has_zero_point)
    return "" if inner <= largest else f"at most {largest} products are summed exactly in a group, not {inner}"


def windows_of(conv: nn.Conv2d) -> Windows:
    """Where a convolution looks."""
    if conv.padding == "same":
        around = [dilation * (kernel - 1) for dilation, kernel in zip(conv.dilation, conv.kernel_size, strict=True)]
        before = [total // 2 for total in around]
        after = [total - half for total, half in zip(around, before, strict=True)]
    else:
        before = after = [0, 0] if isinstance(conv.padding, str) else list(conv.padding)
    padding = [before[1], after[1], before[0], after[0]]
    return Windows(list(conv.kernel_size), list(conv.stride), padding, list(conv.dilation), conv.groups)
