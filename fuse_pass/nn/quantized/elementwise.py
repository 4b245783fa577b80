"""Layers whose input and output are quantised; what they do in between is `torch.nn`'s own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fuse_pass.nn.quantized.base import QuantizedLayer, simulated
from fuse_pass.spec import QuantSpec


class Elementwise(QuantizedLayer):
    """Mixin: quantised input → the `torch.nn` layer, which is the last base → quantised output.

    Args:
        *of_torch: arguments of the `torch.nn` layer.
        exp_bits: exponent bits of an IEEE-like format, 2…11.
        sig_bits: its explicit fraction bits, 1…52.
        rmode: rounding mode, by number 0…9 or name.
        spec: what is quantised and how, instead of the format above.
        **options: further arguments of the `torch.nn` layer.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.float_type = cls.__bases__[-1]

    def __init__(
        self,
        *of_torch: Any,
        exp_bits: int = 5,
        sig_bits: int = 10,
        rmode: int | str = 1,
        spec: QuantSpec | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*of_torch, **options)
        self.spec = spec or simulated(exp_bits, sig_bits, rmode)

    def forward(self, input: Tensor) -> Any:
        result = super().forward(self._input(input))
        if isinstance(result, tuple):
            return (self._output(result[0]), *result[1:])
        return self._output(result)
