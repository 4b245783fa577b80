"""Layers for explicit use; one file per layer, the same ops underneath as in rewritten graphs."""

from fuse_pass.nn.fused_dense_gelu_dense import FusedDenseGELUDense
from fuse_pass.nn.fused_dropout_layer_norm import FusedDropoutLayerNorm

__all__ = ["FusedDenseGELUDense", "FusedDropoutLayerNorm"]
