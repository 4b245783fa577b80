"""Layers whose input and output are quantised; what they do in between is `torch.nn`'s own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fuse_pass.quantization.layers.base import ByFormat


class Elementwise(ByFormat):
    """Mixin: quantised input → the `torch.nn` layer, which is the last base → quantised output.

    With `inplace=True` and a quantised input, what is written is the quantised copy, and the input stays as it is.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.float_type = cls.__bases__[-1]

    def forward(self, input: Tensor) -> Any:
        result = super().forward(self._input(input))
        if isinstance(result, tuple):
            return (self._output(result[0]), *result[1:])
        return self._output(result)
