"""Layers for explicit use; one file per layer, the same ops underneath as in rewritten graphs."""

from fuse_pass.nn import quantized
from fuse_pass.nn.bit_linear import BitLinear
from fuse_pass.nn.fused_dense_gelu_dense import FusedDenseGELUDense
from fuse_pass.nn.fused_dropout_layer_norm import FusedDropoutLayerNorm
from fuse_pass.nn.int8_linear import Int8Linear
from fuse_pass.nn.quantized import *  # noqa: F403 - every Quantized* layer

__all__ = ["BitLinear", "FusedDenseGELUDense", "FusedDropoutLayerNorm", "Int8Linear", *quantized.__all__]
