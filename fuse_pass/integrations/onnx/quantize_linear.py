"""Fake quantisation as QuantizeLinear and DequantizeLinear, bit for bit; by arithmetic where these say something else.

    integers     2 to 4 bits INT4 (opset 21), to 8 bits INT8, to 16 bits INT16 (opset 21): rounding to nearest, with one
                 scale, one along an axis, or one for each block of neighbours (opset 21)
    fp8          FLOAT8E4M3FN, FLOAT8E5M2 and their fnuz kin (opset 19): rounding to nearest, overflow as ONNX has it

Symmetric integers leave the most negative code out: x is clipped to what the last code stands for first. ONNX leaves
open which integer NaN becomes; with a scale that is taken from x all of it is NaN, as in PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.onnx.ops
from torch import Tensor

from fuse_pass.integrations.onnx.opset import Opset
from fuse_pass.integrations.onnx.rounding import round_signed, rounded
from fuse_pass.numerics import rounding as core
from fuse_pass.ops.fake_quantize import FakeQuantize, FloatRounding
from fuse_pass.ops.fake_quantize_int import FakeQuantizeInt

# What PyTorch has no dtype for is a number of ONNX's.
_INT4 = 22


@dataclass(frozen=True)
class _Integers:
    bits: int
    type: torch.dtype | int
    opset: int


_INTEGERS = (_Integers(4, _INT4, 21), _Integers(8, torch.int8, 13), _Integers(16, torch.int16, 21))
_FLOAT8 = {
    (4, 3, 7, "fn"): (torch.float8_e4m3fn, 17),
    (4, 3, 8, "fnuz"): (torch.float8_e4m3fnuz, 18),
    (5, 2, 15, "ieee"): (torch.float8_e5m2, 19),
    (5, 2, 16, "fnuz"): (torch.float8_e5m2fnuz, 20),
}


@dataclass(frozen=True)
class Scales:
    """Which elements share a scale, as ONNX says it."""

    scale: Tensor
    zero_point: Tensor | None
    attributes: dict[str, int]
    needs: int


def scales_of(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Scales | None:
    """None where ONNX has no word for it: scales that differ along several dimensions, but not as blocks do."""
    if scale.numel() == 1 and (zero_point is None or zero_point.numel() == 1):
        return Scales(scale.reshape(()), None if zero_point is None else zero_point.reshape(()), {}, 13)
    if zero_point is not None and zero_point.shape != scale.shape:
        return None
    sizes = (1,) * (x.dim() - scale.dim()) + tuple(scale.shape)
    shared = [dim for dim, size in enumerate(sizes) if _is(size, 1)]
    own = [dim for dim in range(x.dim()) if dim not in shared]
    if len(own) == 1 and _is(x.shape[own[0]], sizes[own[0]]):
        flat = scale.reshape(-1), None if zero_point is None else zero_point.reshape(-1)
        return Scales(*flat, {"axis": own[0]}, 13)
    if len(shared) == 1 and len(sizes) == x.dim() and isinstance(x.shape[shared[0]], int):
        attributes = {"axis": shared[0], "block_size": int(x.shape[shared[0]])}
        return Scales(scale.reshape(sizes), None if zero_point is None else zero_point.reshape(sizes), attributes, 21)
    return None


def _is(size: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for certain; adds no guards."""
    return size == other if isinstance(size, int) and isinstance(other, int) else size is other


def integers(op: FakeQuantizeInt, opset: Opset) -> Tensor:
    """The op `fake_quantize_int`."""
    low, high = op.how.quant_min, op.how.quant_max
    kind = next((row for row in _INTEGERS if -(2 ** (row.bits - 1)) <= low and high < 2 ** (row.bits - 1)), None)
    scales = scales_of(op.x, op.scale, op.zero_point)
    if op.how.rounding != "nearest" or op.x.dtype is torch.float64 or kind is None or scales is None or _is_empty(op.x):
        return _integers_by_arithmetic(op)
    opset.require(kind.opset, f"integers of {kind.bits} bits")
    opset.require(scales.needs, "a scale for each block of neighbours")
    x, step = op.x.to(torch.float32), scales.scale.to(torch.float32)
    if (low, high) != (-(2 ** (kind.bits - 1)), 2 ** (kind.bits - 1) - 1):
        x = _clipped(x, op, float(low), float(high))
    code = zero_code(step, scales.zero_point, kind.type)
    return _there_and_back(x, step, code, scales.attributes, kind.type).to(op.x.dtype)


def _clipped(x: Tensor, op: FakeQuantizeInt, low: float, high: float) -> Tensor:
    """x within what the first and the last code stand for; rounding does the rest exactly."""
    step = op.scale.to(torch.float32)
    shift = 0.0 if op.zero_point is None else op.zero_point.to(torch.float32)
    ends = (low - shift) * step, (high - shift) * step
    if any(end.numel() != 1 for end in ends):
        return torch.minimum(torch.maximum(x, ends[0]), ends[1])
    # At once: the optimizer of onnxscript (0.7) makes a Clip of the two, and loses its limits where there are several.
    scalars = (end.reshape(()) for end in ends)
    return torch.onnx.ops.symbolic("Clip", (x, *scalars), dtype=x.dtype, shape=x.shape)


def zero_code(scale: Tensor, zero: Tensor | None, dtype: torch.dtype | int) -> Tensor | None:
    """The zero point in the type of the codes; None for 4 bits without one, of which there are no constants."""
    if isinstance(dtype, torch.dtype):
        return torch.zeros_like(scale, dtype=dtype) if zero is None else zero.to(dtype)
    if zero is None:
        return None
    return torch.onnx.ops.symbolic("Cast", (zero.to(torch.float32),), {"to": dtype}, dtype=dtype, shape=zero.shape)


def _there_and_back(
    x: Tensor, scale: Tensor, zero: Tensor | None, attributes: dict[str, int], dtype: torch.dtype | int
) -> Tensor:
    there: dict[str, Any] = attributes if zero is not None else {**attributes, "output_dtype": dtype}
    back: dict[str, Any] = {name: value for name, value in attributes.items() if name != "saturate"}
    codes = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), there, dtype=dtype, shape=x.shape)
    return torch.onnx.ops.symbolic("DequantizeLinear", (codes, scale, zero), back, dtype=scale.dtype, shape=x.shape)


def _is_empty(x: Tensor) -> bool:
    return any(_is(size, 0) for size in x.shape)


def _integers_by_arithmetic(op: FakeQuantizeInt) -> Tensor:
    carrier = core.compute_carrier(op.x.dtype)
    step = op.scale.to(carrier.dtype)
    q = round_signed(op.x.to(carrier.dtype) / step, op.how.rounding)
    zero = None if op.zero_point is None else op.zero_point.to(carrier.dtype)
    q = q if zero is None else q + zero
    # Not by Clip, in which runtimes lose NaN.
    q = torch.where(q < op.how.quant_min, float(op.how.quant_min), q)
    q = torch.where(q > op.how.quant_max, float(op.how.quant_max), q)
    return ((q if zero is None else q - zero) * step).to(op.x.dtype)


def floats(op: FakeQuantize, opset: Opset) -> Tensor:
    """The op `fake_quantize`."""
    float8 = _float8_of(op.how)
    if float8 is None or op.x.dtype is torch.float64 or _is_empty(op.x):
        return rounded(op.x, op.how)
    opset.require(19, f"{op.how.format.name} as ONNX's float8")
    x = op.x.to(torch.float32)
    if op.how.overflow != "saturate":
        x = x * torch.where(_overflows(x, op.how), math.inf, torch.ones_like(x))
    one, (dtype, number) = torch.ones((), dtype=torch.float32, device=x.device), float8
    zero = torch.onnx.ops.symbolic("Cast", (torch.zeros_like(one),), {"to": number}, dtype=dtype, shape=())
    return _there_and_back(x, one, zero, {"saturate": int(op.how.overflow == "saturate")}, dtype).to(op.x.dtype)


def _overflows(x: Tensor, how: FloatRounding) -> Tensor:
    """Where x rounds beyond the largest number; ONNX Runtime (1.32) has some of it become the largest, or NaN."""
    fmt = how.format
    middle = fmt.max + math.ldexp(1.0, fmt.emax - fmt.sig_bits - 1)
    # A tie goes to the even one: the largest of "fn" is even, all others are odd.
    return x.abs() > middle if fmt.encoding == "fn" else x.abs() >= middle


def _float8_of(how: FloatRounding) -> tuple[torch.dtype, int] | None:
    """None where ONNX has no such type, or rounds to it otherwise."""
    float8 = _FLOAT8.get((how.exp_bits, how.sig_bits, how.bias, how.encoding))
    # ONNX saturates infinities as well, which are numbers of their own for us where the format has them.
    keeps_infinities = how.format.has_inf and how.overflow == "saturate"
    is_exact = how.rounding == "nearest" and how.subnormal and not keeps_infinities
    return float8 if is_exact else None
