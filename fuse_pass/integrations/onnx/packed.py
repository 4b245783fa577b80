"""Packed weights in ONNX: products with them, and the order in which a file keeps them.

`in_file_order` copies a model; its packed layers keep their codes by rows, as ONNX's own operators read them:

    weight only             uint8 `[columns, blocks, bytes of a block]`, for MatMulNBits (com.microsoft)
    nf4 and fp4             uint8 `[columns, inner / 2]`, looked up by Gather
    integer products        uint8 `[columns, ceil(inner · bits / 8)]`, lowest bits first, for MatMulInteger

A weight that is still in the order of `kernels.few_bits` is unpacked by the model itself.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.integrations.onnx import products
from fuse_pass.kernels import few_bits
from fuse_pass.numerics.tensors import accumulation_dtype, rows_of
from fuse_pass.ops.packed_dense import WEIGHT_ONLY, PackedDense, PackedWeight
from fuse_pass.quantization.layers.packed import PackedLinear
from fuse_pass.quantization.layers.packed_quantized import PackedQuantizedLinear


def in_file_order(model: nn.Module) -> nn.Module:
    """A copy of the model that shares its parameters, and its buffers but those of packed weights."""
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    for module in model.modules():
        if isinstance(module, (PackedLinear, PackedQuantizedLinear)):
            _reorder(module)
    return model


def _reorder(layer: PackedLinear | PackedQuantizedLinear) -> None:
    """Codes by rows, and scales by rows `[columns, groups]`, in the buffers that the layer hands to its op."""
    bits, columns = layer.bits, layer.out_features
    if not layer.is_weight_only:
        layer.words = in_bytes(few_bits.unpack(layer.words, columns, layer.in_features, bits), bits)
        return
    padded = layer.words.shape[1] * (32 // bits)
    codes = few_bits.unpack(layer.words, columns, padded, bits)
    layer.scale = few_bits.unpack_columns(layer.scale, columns)
    layer.shift = None if layer.shift is None else few_bits.unpack_columns(layer.shift, columns)
    groups = layer.scale.shape[1]
    block = _block_of(padded, groups) if layer.is_integer and padded else None
    if block is None:
        layer.words = codes.view(torch.int8) if bits == 8 else in_bytes(codes, 4)
        return
    blocks = -(-padded // block)
    repeats = blocks // groups
    codes = F.pad(codes ^ (1 << (bits - 1)), (0, blocks * block - padded))
    layer.words = in_bytes(codes, bits).view(columns, blocks, -1)
    layer.scale = layer.scale.repeat_interleave(repeats, 1)
    if layer.shift is not None:
        layer.shift = _zeros_in_bytes(layer.scale, layer.shift.repeat_interleave(repeats, 1), bits)


def _block_of(inner: int, groups: int) -> int | None:
    """A number of inputs that share a scale, in which MatMulNBits has blocks: 16, 32, 64 or 128."""
    if groups == 1:
        return next((size for size in (16, 32, 64) if inner <= size), 128)
    common = math.gcd(inner // groups, 128)
    return common if common >= 16 else None


def _zeros_in_bytes(scale: Tensor, shift: Tensor, bits: int) -> Tensor:
    """`shift / scale` is an integer, of which a rounded product is all that was kept."""
    zero = torch.round(shift / torch.where(scale == 0, 1.0, scale)) + (1 << (bits - 1))
    return in_bytes(zero.to(torch.uint8), bits)


def in_bytes(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[columns, inner]` → `[columns, ceil(inner · bits / 8)]`, the first code in the lowest bits."""
    per_byte = 8 // bits
    padded = F.pad(codes, (0, -codes.shape[1] % per_byte))
    octets = torch.zeros_like(padded[:, ::per_byte])
    for place in range(per_byte):
        octets = octets | (padded[:, place::per_byte] << (bits * place))
    return octets.contiguous()


def codes_of(words: Tensor, columns: int, inner: int, bits: int) -> Tensor:
    """uint8 `[columns, inner]`, of either order."""
    if words.dim() == 3:
        return few_bits.unpack(words, columns, inner, bits)
    if bits == 8:
        return words
    mask = (1 << bits) - 1
    parts = [words >> shift & mask if shift else words & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(1)[:, :inner]


def integer_product(a: Tensor, words: Tensor, columns: int, bits: int) -> Tensor:
    """The op `integer_product`."""
    return products.integer_product(a, codes_of(words, columns, a.shape[1], bits), 0)


def outlier_product(outliers: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """The op `outlier_product`; all columns, whether they hold outliers or not."""
    codes = codes_of(words, scale.shape[0], outliers.shape[1], 8)
    weight = (codes.to(outliers.dtype) - 128) * scale.to(outliers.dtype).unsqueeze(1)
    return outliers @ weight.t()


def packed_dense(op: PackedDense) -> Tensor:
    """The op `packed_dense`."""
    weight = op.weight
    if weight.kind != WEIGHT_ONLY:
        return op.forward()
    rows = rows_of(op.x)
    y = float_sums(rows.to(accumulation_dtype(rows.dtype)), weight)
    y = y if op.bias is None else y + op.bias
    return y.to(op.x.dtype).reshape(*op.x.shape[:-1], weight.columns)


def float_sums(x: Tensor, weight: PackedWeight) -> Tensor:
    """`Σ x Ŵ`, `[rows, columns]`."""
    words, scale, inner = weight.words, weight.scale, x.shape[-1]
    if words.dtype is torch.int32:
        return x @ weight.real(inner).to(x.dtype).t()
    if words.dim() == 3 and x.dtype is torch.float32:
        return products.block_product(x, words, scale, weight.shift, weight.bits)
    return x @ _real(weight)[:, :inner].to(x.dtype).t()


def _real(weight: PackedWeight) -> Tensor:
    """Ŵ `[columns, padded]`, float32, of codes by rows."""
    words, scale, shift, bits = weight.words, weight.scale, weight.shift, weight.bits
    columns, groups = scale.shape
    if words.dim() == 3:
        middle = 1 << (bits - 1)
        zero = middle if shift is None else codes_of(shift, columns, groups, bits).to(scale.dtype).unsqueeze(2)
        padded = words.shape[1] * words.shape[2] * (8 // bits)
        codes = codes_of(words.flatten(1), columns, padded, bits).to(scale.dtype)
        return ((codes.view(columns, groups, -1) - zero) * scale.unsqueeze(2)).flatten(1)
    if words.dtype is torch.int8:
        values = words.to(scale.dtype)
    else:
        assert weight.table is not None
        values = weight.table[codes_of(words, columns, words.shape[1] * 2, 4).to(torch.int64)]
    grouped = values.view(columns, groups, -1) * scale.unsqueeze(2)
    return (grouped if shift is None else grouped - shift.unsqueeze(2)).flatten(1)


def float_product(
    x: Tensor, words: Tensor, table: Tensor, scale: Tensor, shift: Tensor | None, columns: int, bits: int
) -> Tensor:
    """The op `float_product`, of weights in the order of the kernels."""
    return x @ few_bits.float_weight(words, table, scale, shift, columns, x.shape[1], bits).t()
