"""Pooling with quantised input and output; arguments as `ByFormat` says."""

from __future__ import annotations

from torch import nn

from fuse_pass.quantization.layers.elementwise import Elementwise


class QuantizedMaxPool1d(Elementwise, nn.MaxPool1d):
    """`nn.MaxPool1d` with quantised input and output; indices pass as they are."""


class QuantizedMaxPool2d(Elementwise, nn.MaxPool2d):
    """`nn.MaxPool2d` with quantised input and output; indices pass as they are."""


class QuantizedMaxPool3d(Elementwise, nn.MaxPool3d):
    """`nn.MaxPool3d` with quantised input and output; indices pass as they are."""


class QuantizedAvgPool1d(Elementwise, nn.AvgPool1d):
    """`nn.AvgPool1d` with quantised input and output."""


class QuantizedAvgPool2d(Elementwise, nn.AvgPool2d):
    """`nn.AvgPool2d` with quantised input and output."""


class QuantizedAvgPool3d(Elementwise, nn.AvgPool3d):
    """`nn.AvgPool3d` with quantised input and output."""


class QuantizedAdaptiveAvgPool1d(Elementwise, nn.AdaptiveAvgPool1d):
    """`nn.AdaptiveAvgPool1d` with quantised input and output."""


class QuantizedAdaptiveAvgPool2d(Elementwise, nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d` with quantised input and output."""


class QuantizedAdaptiveAvgPool3d(Elementwise, nn.AdaptiveAvgPool3d):
    """`nn.AdaptiveAvgPool3d` with quantised input and output."""


class QuantizedAdaptiveMaxPool1d(Elementwise, nn.AdaptiveMaxPool1d):
    """`nn.AdaptiveMaxPool1d` with quantised input and output; indices pass as they are."""


class QuantizedAdaptiveMaxPool2d(Elementwise, nn.AdaptiveMaxPool2d):
    """`nn.AdaptiveMaxPool2d` with quantised input and output; indices pass as they are."""


class QuantizedAdaptiveMaxPool3d(Elementwise, nn.AdaptiveMaxPool3d):
    """`nn.AdaptiveMaxPool3d` with quantised input and output; indices pass as they are."""
