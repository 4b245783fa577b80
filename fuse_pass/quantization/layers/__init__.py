"""Quantised layers: subclasses of `torch.nn` layers with number formats in forward and full-precision parameters."""

from __future__ import annotations

from torch import nn

from fuse_pass.quantization.layers.activation import (
    QuantizedCELU,
    QuantizedELU,
    QuantizedGELU,
    QuantizedGLU,
    QuantizedHardsigmoid,
    QuantizedHardswish,
    QuantizedHardtanh,
    QuantizedLeakyReLU,
    QuantizedLogSigmoid,
    QuantizedLogSoftmax,
    QuantizedMish,
    QuantizedPReLU,
    QuantizedReLU,
    QuantizedReLU6,
    QuantizedSELU,
    QuantizedSigmoid,
    QuantizedSiLU,
    QuantizedSoftmax,
    QuantizedSoftplus,
    QuantizedSoftsign,
    QuantizedTanh,
)
from fuse_pass.quantization.layers.attention import QuantizedMultiheadAttention
from fuse_pass.quantization.layers.base import QuantizedLayer
from fuse_pass.quantization.layers.convolution import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from fuse_pass.quantization.layers.dropout import (
    QuantizedAlphaDropout,
    QuantizedDropout,
    QuantizedDropout1d,
    QuantizedDropout2d,
    QuantizedDropout3d,
)
from fuse_pass.quantization.layers.embedding import QuantizedEmbedding
from fuse_pass.quantization.layers.linear import QuantizedLinear
from fuse_pass.quantization.layers.normalization import (
    QuantizedBatchNorm1d,
    QuantizedBatchNorm2d,
    QuantizedBatchNorm3d,
    QuantizedGroupNorm,
    QuantizedInstanceNorm1d,
    QuantizedInstanceNorm2d,
    QuantizedInstanceNorm3d,
    QuantizedLayerNorm,
    QuantizedLinearNorm,
    QuantizedRMSNorm,
)
from fuse_pass.quantization.layers.pooling import (
    QuantizedAdaptiveAvgPool1d,
    QuantizedAdaptiveAvgPool2d,
    QuantizedAdaptiveAvgPool3d,
    QuantizedAdaptiveMaxPool1d,
    QuantizedAdaptiveMaxPool2d,
    QuantizedAdaptiveMaxPool3d,
    QuantizedAvgPool1d,
    QuantizedAvgPool2d,
    QuantizedAvgPool3d,
    QuantizedMaxPool1d,
    QuantizedMaxPool2d,
    QuantizedMaxPool3d,
)
from fuse_pass.quantization.layers.recurrent import QuantizedGRU, QuantizedLSTM, QuantizedRNN

__all__ = [
    "LAYER_FOR",
    "QuantizedAdaptiveAvgPool1d",
    "QuantizedAdaptiveAvgPool2d",
    "QuantizedAdaptiveAvgPool3d",
    "QuantizedAdaptiveMaxPool1d",
    "QuantizedAdaptiveMaxPool2d",
    "QuantizedAdaptiveMaxPool3d",
    "QuantizedAlphaDropout",
    "QuantizedAvgPool1d",
    "QuantizedAvgPool2d",
    "QuantizedAvgPool3d",
    "QuantizedBatchNorm1d",
    "QuantizedBatchNorm2d",
    "QuantizedBatchNorm3d",
    "QuantizedCELU",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedDropout",
    "QuantizedDropout1d",
    "QuantizedDropout2d",
    "QuantizedDropout3d",
    "QuantizedELU",
    "QuantizedEmbedding",
    "QuantizedGELU",
    "QuantizedGLU",
    "QuantizedGRU",
    "QuantizedGroupNorm",
    "QuantizedHardsigmoid",
    "QuantizedHardswish",
    "QuantizedHardtanh",
    "QuantizedInstanceNorm1d",
    "QuantizedInstanceNorm2d",
    "QuantizedInstanceNorm3d",
    "QuantizedLSTM",
    "QuantizedLayer",
    "QuantizedLayerNorm",
    "QuantizedLeakyReLU",
    "QuantizedLinear",
    "QuantizedLinearNorm",
    "QuantizedLogSigmoid",
    "QuantizedLogSoftmax",
    "QuantizedMaxPool1d",
    "QuantizedMaxPool2d",
    "QuantizedMaxPool3d",
    "QuantizedMish",
    "QuantizedMultiheadAttention",
    "QuantizedPReLU",
    "QuantizedRMSNorm",
    "QuantizedRNN",
    "QuantizedReLU",
    "QuantizedReLU6",
    "QuantizedSELU",
    "QuantizedSiLU",
    "QuantizedSigmoid",
    "QuantizedSoftmax",
    "QuantizedSoftplus",
    "QuantizedSoftsign",
    "QuantizedTanh",
]

_LAYERS: tuple[type[QuantizedLayer], ...] = tuple(globals()[name] for name in __all__ if name.startswith("Quantized"))
LAYER_FOR: dict[type[nn.Module], type[QuantizedLayer]] = {
    layer.float_type: layer for layer in _LAYERS if layer is not QuantizedLayer
}
"""The layer that takes the place of another, by the type of the other."""
