"""Activations and softmax with quantised input and output; arguments as `ByFormat` says."""

from __future__ import annotations

from torch import Tensor, nn

from fuse_pass.quantization.layers.elementwise import Elementwise


class QuantizedReLU(Elementwise, nn.ReLU):
    """`nn.ReLU` with quantised input and output."""


class QuantizedReLU6(Elementwise, nn.ReLU6):
    """`nn.ReLU6` with quantised input and output."""


class QuantizedLeakyReLU(Elementwise, nn.LeakyReLU):
    """`nn.LeakyReLU` with quantised input and output."""


class QuantizedELU(Elementwise, nn.ELU):
    """`nn.ELU` with quantised input and output."""


class QuantizedCELU(Elementwise, nn.CELU):
    """`nn.CELU` with quantised input and output."""


class QuantizedSELU(Elementwise, nn.SELU):
    """`nn.SELU` with quantised input and output."""


class QuantizedGELU(Elementwise, nn.GELU):
    """`nn.GELU` with quantised input and output."""


class QuantizedSiLU(Elementwise, nn.SiLU):
    """`nn.SiLU` with quantised input and output."""


class QuantizedMish(Elementwise, nn.Mish):
    """`nn.Mish` with quantised input and output."""


class QuantizedSigmoid(Elementwise, nn.Sigmoid):
    """`nn.Sigmoid` with quantised input and output."""


class QuantizedLogSigmoid(Elementwise, nn.LogSigmoid):
    """`nn.LogSigmoid` with quantised input and output."""


class QuantizedHardsigmoid(Elementwise, nn.Hardsigmoid):
    """`nn.Hardsigmoid` with quantised input and output."""


class QuantizedHardswish(Elementwise, nn.Hardswish):
    """`nn.Hardswish` with quantised input and output."""


class QuantizedHardtanh(Elementwise, nn.Hardtanh):
    """`nn.Hardtanh` with quantised input and output."""


class QuantizedTanh(Elementwise, nn.Tanh):
    """`nn.Tanh` with quantised input and output."""


class QuantizedSoftplus(Elementwise, nn.Softplus):
    """`nn.Softplus` with quantised input and output."""


class QuantizedSoftsign(Elementwise, nn.Softsign):
    """`nn.Softsign` with quantised input and output."""


class QuantizedSoftmax(Elementwise, nn.Softmax):
    """`nn.Softmax` with quantised input and output."""


class QuantizedLogSoftmax(Elementwise, nn.LogSoftmax):
    """`nn.LogSoftmax` with quantised input and output."""


class QuantizedGLU(Elementwise, nn.GLU):
    """`nn.GLU` with quantised input and output."""


class QuantizedPReLU(Elementwise, nn.PReLU):
    """`nn.PReLU` with quantised input, slope and output."""

    def forward(self, input: Tensor) -> Tensor:
        return self._output(nn.functional.prelu(self._input(input), self._weight(self.weight)))
