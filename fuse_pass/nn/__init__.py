"""Layers for explicit use; one file per layer, the same ops underneath as in rewritten graphs."""

from fuse_pass.nn import quantized  # noqa: F401 - the first path of the layers
from fuse_pass.nn.fused_dense_gelu_dense import FusedDenseGELUDense
from fuse_pass.nn.fused_dropout_layer_norm import FusedDropoutLayerNorm
from fuse_pass.quantization import layers
from fuse_pass.quantization.layers import *  # noqa: F403 - every Quantized* layer
from fuse_pass.quantization.layers.bit_linear import BitLinear
from fuse_pass.quantization.layers.int8_linear import Int8Linear
from fuse_pass.quantization.layers.packed import PackedLinear
from fuse_pass.quantization.layers.packed_attention import PackedMultiheadAttention
from fuse_pass.quantization.layers.packed_conv2d import PackedConv2d, PackedQuantizedConv2d
from fuse_pass.quantization.layers.packed_embedding import PackedEmbedding
from fuse_pass.quantization.layers.packed_quantized import PackedQuantizedLinear
from fuse_pass.quantization.layers.packed_recurrent import PackedGRU, PackedLSTM, PackedRNN

__all__ = [
    "BitLinear",
    "FusedDenseGELUDense",
    "FusedDropoutLayerNorm",
    "Int8Linear",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedGRU",
    "PackedLSTM",
    "PackedLinear",
    "PackedMultiheadAttention",
    "PackedQuantizedConv2d",
    "PackedQuantizedLinear",
    "PackedRNN",
]
__all__ += layers.__all__
