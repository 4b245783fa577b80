"""Every op of the package in operators that ONNX has, for `ExportedProgram.run_decompositions`.

The table is of its own and not that of Inductor: products are `F.linear` whoever multiplies here, norms are
`F.layer_norm`, so that they become Gemm, Gelu and LayerNormalization; rounding is by `quantize_linear` and `rounding`.
What belongs to training is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.inductor import private
from fuse_pass.inductor.compiler import STORED_ONCE
from fuse_pass.integrations.onnx import packed, products, quantize_linear
from fuse_pass.integrations.onnx.bits import amax, amin, index, right_shift, view_dtype
from fuse_pass.integrations.onnx.opset import Opset
from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.numerics.tensors import rows_of
from fuse_pass.ops.bit_linear import BitLinear, BitLinearPacked
from fuse_pass.ops.dense import Dense, DenseAct
from fuse_pass.ops.dense_act_dense import ActDense, DenseActDense, DenseActDenseInference
from fuse_pass.ops.dropout_norm import LAYER_NORM, DropoutNorm, Settings
from fuse_pass.ops.fake_quantize import FakeQuantize
from fuse_pass.ops.fake_quantize_int import FakeQuantizeInt
from fuse_pass.ops.gated_dense import GatedDense, GatedDenseInference
from fuse_pass.ops.llm_int8 import LlmInt8Linear
from fuse_pass.ops.packed_dense import PackedDense
from fuse_pass.ops.packed_format import straight_through_packed
from fuse_pass.ops.prepacked import DensePrepacked
from fuse_pass.ops.quantized_conv2d import QuantizedConv2d
from fuse_pass.ops.quantized_dense import QuantizedDense
from fuse_pass.ops.straight_through import StraightThrough

Body = Callable[..., Any]
ours, aten = torch.ops.fuse_pass, torch.ops.aten

_MENDED: dict[private.OpOverload, Body] = {
    STORED_ONCE: lambda x, strides: x,
    aten.view.dtype: view_dtype,
    aten.index.Tensor: index,
    aten.amax.default: amax,
    aten.amin.default: amin,
    aten.__rshift__.Scalar: torch.bitwise_right_shift,
    aten.__rshift__.Tensor: torch.bitwise_right_shift,
    aten.bitwise_right_shift.Tensor: right_shift,
    aten.bitwise_right_shift.Tensor_Scalar: right_shift,
}

REFUSED = {
    "seed": "draws random numbers (dropout in training, or stochastic rounding)",
    "taken_seed": "draws random numbers (stochastic rounding)",
    "clip_gradient": "is part of a gradient",
}
"""Ops without a body here, with the reason; so are all whose names end in `_backward`."""


def table(opset: Opset) -> dict[private.OpOverload, Body]:
    """A body for every op of the package that inference has, and for views of bits."""
    bodies: dict[Any, Body] = {
        ours.dense: lambda *args: _dense(Dense.of_call(args)),
        ours.dense_act: lambda *args: _dense_act(DenseAct.of_call(args)),
        ours.dense_prepacked: lambda *args: _dense_act(DensePrepacked.of_call(args)),
        ours.dense_act_dense: lambda *args: _dense_act_dense(DenseActDense.of_call(args)),
        ours.dense_act_dense_inference: lambda *args: DenseActDenseInference.of_call(args).formula(),
        ours.act_dense: lambda *args: ActDense.of_call(args).formula(),
        ours.gated_dense: lambda *args: _gated_dense(GatedDense.of_call(args)),
        ours.gated_dense_inference: lambda *args: GatedDenseInference.of_call(args).formula(),
        ours.dropout_norm: lambda *args: _dropout_norm(DropoutNorm.of_call(args)),
        ours.gemm: _gemm,
        ours.gemm_prepacked: _gemm,
        ours.int8_product: products.int8_product,
        ours.integer_product: packed.integer_product,
        ours.float_product: packed.float_product,
        ours.outlier_product: packed.outlier_product,
        ours.packed_dense: lambda *args: packed.packed_dense(PackedDense.of_call(args)),
        ours.quantized_dense: lambda *args: QuantizedDense.of_call(args).forward(),
        ours.quantized_conv2d: lambda *args: _quantized_conv2d(QuantizedConv2d.of_call(args)),
        ours.llm_int8_linear: lambda *args: LlmInt8Linear.of_call(args).forward(),
        ours.bit_linear: lambda *args: BitLinear.of_call(args).forward(),
        ours.bit_linear_packed: lambda *args: BitLinearPacked.of_call(args).forward(),
        ours.fake_quantize: lambda *args: quantize_linear.floats(FakeQuantize.of_call(args), opset),
        ours.fake_quantize_int: lambda *args: quantize_linear.integers(FakeQuantizeInt.of_call(args), opset),
        ours.straight_through: lambda *args: StraightThrough.of_call(args).forward(),
    }
    return {**{op.default: body for op, body in bodies.items()}, **_MENDED}


def linear_of_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A Linear as Gemm, for models with integers.

    ONNX Runtime (1.32) makes MatMulNBits of a MatMul whose weight is dequantised, which rounds x to int8 once more; it
    leaves Gemm as it is.
    """
    if x.dim() == 2:
        return NotImplemented  # as it is
    return F.linear(rows_of(x), weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def _quantized_conv2d(op: QuantizedConv2d) -> Tensor:
    """By ONNX's own convolution, whose float sums of integers are exact up to 2^24."""
    return op.by(op.float_sums)


def _dense(op: Dense | DensePrepacked) -> Tensor:
    return F.linear(op.x, op.weight, op.bias)


def _dense_act(op: DenseAct | DensePrepacked) -> Tensor:
    y = _dense(op)
    return ACTIVATIONS[op.activation].forward(y, op.act_arguments, None) if op.activation else y


def _dense_act_dense(op: DenseActDense) -> tuple[Tensor, Tensor]:
    return op.formula(), F.linear(rows_of(op.x), op.weight1, op.bias1)


def _gated_dense(op: GatedDense) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows_of(op.x)
    h = F.linear(rows, op.weight1, op.bias1)
    return op.formula(), h, h.new_zeros(0) if op.weight_up is None else F.linear(rows, op.weight_up, op.bias_up)


def _gemm(
    a: Tensor, b: Tensor, bias: Tensor | None, attribute: str, arguments: Sequence[float], algorithm: str
) -> Tensor:
    y = F.linear(a, b, bias)
    rows = (row for row in ACTIVATIONS.values() if row.post_op == (attribute, algorithm))
    return next(rows).forward(y, arguments, None) if attribute != "none" else y


def _dropout_norm(op: DropoutNorm) -> tuple[Tensor, Tensor, Tensor]:
    settings = op.settings
    z = settings.added(settings.dropped(op.x), op.residual)
    seen = straight_through_packed(z, settings.sum_format)
    y = _normalised(settings, seen, op.weight, op.bias)
    statistics = settings.normalised(seen, None, None)[1]
    return y, op.x.new_zeros(0) if z is op.x else z, statistics


def _normalised(settings: Settings, z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    dtype = settings.dtype_of(z)
    wide = z.to(dtype).to(torch.float64 if dtype is torch.float64 else torch.float32)
    in_one = not settings.round_normalised
    w, b = ((None if part is None else part.to(wide.dtype)) for part in ((weight, bias) if in_one else (None, None)))
    if settings.norm == LAYER_NORM:
        y = F.layer_norm(wide, settings.row_of(z), w, b, settings.eps)
    else:
        y = wide * torch.rsqrt((wide * wide).mean(settings.dims, keepdim=True) + settings.eps)
        y = y if w is None else y * w
        y = y if b is None else y + b
    y = y.to(dtype)
    if not in_one:
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
    return y.to(dtype)


def refusal(name: str) -> str | None:
    """Why an op of the package cannot be in an exported model; None where it can."""
    return REFUSED.get(name) or ("is part of a gradient" if name.endswith("_backward") else None)


@functools.cache
def known() -> frozenset[str]:
    """The names of the ops that have a body here."""
    return frozenset(op.name().removeprefix("fuse_pass::") for op in table(Opset(99)) if "fuse_pass" in op.name())
