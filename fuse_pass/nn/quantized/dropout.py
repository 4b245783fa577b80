"""Dropout with quantised input and output; arguments as `ByFormat` says."""

from __future__ import annotations

from torch import nn

from fuse_pass.nn.quantized.elementwise import Elementwise


class QuantizedDropout(Elementwise, nn.Dropout):
    """`nn.Dropout` with quantised input and output."""


class QuantizedDropout1d(Elementwise, nn.Dropout1d):
    """`nn.Dropout1d` with quantised input and output."""


class QuantizedDropout2d(Elementwise, nn.Dropout2d):
    """`nn.Dropout2d` with quantised input and output."""


class QuantizedDropout3d(Elementwise, nn.Dropout3d):
    """`nn.Dropout3d` with quantised input and output."""


class QuantizedAlphaDropout(Elementwise, nn.AlphaDropout):
    """`nn.AlphaDropout` with quantised input and output."""
