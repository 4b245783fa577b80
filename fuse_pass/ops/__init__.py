"""The fused operators, `torch.ops.fuse_pass.*`; importing this package registers them."""

from fuse_pass.ops import (
    bit_linear,
    dense,
    dense_act_dense,
    dropout_norm,
    fake_quantize,
    fake_quantize_int,
    gated_dense,
    llm_int8,
    packed_dense,
    prepacked,
    products,
    quantized_conv2d,
    quantized_dense,
    seed,
    straight_through,
)

__all__ = [
    "bit_linear",
    "dense",
    "dense_act_dense",
    "dropout_norm",
    "fake_quantize",
    "fake_quantize_int",
    "gated_dense",
    "llm_int8",
    "packed_dense",
    "prepacked",
    "products",
    "quantized_conv2d",
    "quantized_dense",
    "seed",
    "straight_through",
]
