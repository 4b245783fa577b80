"""Linear with quantised operands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.quantization.layers.base import QuantizedLayer, simulated


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` whose input, weight, bias and output are rounded to a number format.

    Maps `[..., in_features]` to `[..., out_features]`; state dict `weight [out, in]`, `bias [out]`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        exp_bits: exponent bits of an IEEE-like format, 2…11.
        sig_bits: its explicit fraction bits, 1…52.
        rmode: rounding mode, by number 0…9 or name.
        bias: whether there is a bias.
        spec: what is quantised and how, instead of the format above.
        device: where the parameters are created.
        dtype: their dtype.
    """

    float_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        exp_bits: int = 5,
        sig_bits: int = 10,
        rmode: int | str = 1,
        *,
        bias: bool = True,
        spec: QuantSpec | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.spec = spec or simulated(exp_bits, sig_bits, rmode)

    def forward(self, input: Tensor) -> Tensor:
        return self._output(F.linear(self._input(input), self._weight(self.weight), self._bias(self.bias)))
