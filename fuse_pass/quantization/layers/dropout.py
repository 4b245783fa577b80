"""Dropout with quantised input and output in training; arguments as `ByFormat` says.

In evaluation dropout is the identity, and so is its layer here: nothing is quantised. `convert` leaves dropout as it is
unless a mapping names its type: what is dropped has been quantised by the layer before it, where that quantises its
output, and what comes of it is quantised by the next layer, which reads it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fuse_pass.quantization.layers.elementwise import Elementwise


class Dropping(Elementwise):
    """Mixin: as `Elementwise` in training, the identity in evaluation."""

    def forward(self, input: Tensor) -> Any:
        if self.training:
            return super().forward(input)
        if self._watch is not None:  # `calibrate` looks for the scales of training in evaluation
            for site in ("input", "output"):
                if getattr(self.spec, site) is not None:
                    self._watch(site, input)
        return self.float_type.forward(self, input)


class QuantizedDropout(Dropping, nn.Dropout):
    """`nn.Dropout` with quantised input and output in training."""


class QuantizedDropout1d(Dropping, nn.Dropout1d):
    """`nn.Dropout1d` with quantised input and output in training."""


class QuantizedDropout2d(Dropping, nn.Dropout2d):
    """`nn.Dropout2d` with quantised input and output in training."""


class QuantizedDropout3d(Dropping, nn.Dropout3d):
    """`nn.Dropout3d` with quantised input and output in training."""


class QuantizedAlphaDropout(Dropping, nn.AlphaDropout):
    """`nn.AlphaDropout` with quantised input and output in training."""
