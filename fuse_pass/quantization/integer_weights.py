"""How the weight of a calibrated layer becomes packed integers, and which layers can have that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuse_pass.kernels import few_bits
from fuse_pass.numerics.formats import Format, Granularity, IntFormat
from fuse_pass.numerics.rounding import STOCHASTIC
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.numerics.tensors import accumulation_dtype
from fuse_pass.ops.quantized_dense import max_inner
from fuse_pass.quantization.functional import quantize_at, quantizer_at
from fuse_pass.quantization.layers.base import QuantizedLayer
from fuse_pass.quantization.packing import require_finite
from fuse_pass.quantization.quantizers import Quantizer


def problem_of(
    layer: QuantizedLayer, inner: int, weight_rows: Sequence[Granularity], input_rows: Sequence[Granularity]
) -> str:
    """Why a layer with one weight cannot be packed to what it computes; empty where it can.

    Args:
        layer: with `weight` and `bias`.
        inner: how many products are summed.
        weight_rows: the granularities that give every row of the weight, which are summed, one scale.
        input_rows: those that give everything that one sum reads one scale.
    """
    spec: QuantSpec = layer.spec
    weight: Any = layer.weight
    if spec.weight is None:
        return "its weight is not quantised"
    if weight.numel() == 0:
        return "its weight is empty, and has no scale"
    problem = _problem_of_weight(spec.weight, inner, weight_rows, has_input=spec.input is not None)
    if not problem and spec.input is not None:
        problem = _problem_of_input(spec.input, spec.weight, inner, input_rows)
    return problem or _problem_of_scales(layer)


def _problem_of_weight(site: Site, inner: int, rows: Sequence[Granularity], *, has_input: bool) -> str:
    if not has_codes(site.format):
        return f"weights of {site.format.name} are no integers of 2 to 8 bits"
    if site.rounding in STOCHASTIC:
        return "its weight is rounded at random in every call"
    size = site.granularity.size
    if size is None:
        return "" if site.granularity in rows else f"its weight is scaled by {site.granularity.kind}, and not by row"
    if has_input:
        return "sums of integers over groups that have scales of their own are not supported; leave the input as it is"
    if inner % size or size % (32 // width_of(site.format)):
        return f"groups of {size} do not divide {inner} inputs, or are no multiple of {32 // width_of(site.format)}"
    return ""


def _problem_of_input(site: Site, weight: Site, inner: int, rows: Sequence[Granularity]) -> str:
    if not has_codes(site.format):
        return f"inputs of {site.format.name} are no integers of 2 to 8 bits"
    if site.rounding in STOCHASTIC:
        return "its input is rounded at random"
    if site.granularity not in rows:
        return f"its input is scaled by {site.granularity.kind}, and not by row"
    largest = max_inner(width_of(weight.format), has_zero_point=site.format.has_zero_point)
    return "" if inner <= largest else f"at most {largest} products are summed exactly in int32, not {inner}"


def _problem_of_scales(layer: QuantizedLayer) -> str:
    spec: QuantSpec = layer.spec
    for name in ("input", "weight", "bias", "output"):
        site: Site | None = getattr(spec, name)
        if site is None:
            continue
        scale = getattr(layer, f"{name}_scale", None)
        if scale is None and site.needs_scale:
            return f"the scale of its {name} is {site.scale} and has no value yet; call fuse_pass.calibrate first"
        if name == "input" and scale is not None and scale.numel() != 1:
            return "its input has several scales that were set"
    bias = spec.bias
    return "its bias is rounded at random in every call" if bias is not None and bias.rounding in STOCHASTIC else ""


def has_codes(fmt: Format) -> bool:
    return isinstance(fmt, IntFormat) and fmt.bits <= 8


def width_of(fmt: Format) -> int:
    """Bits of a packed code."""
    assert isinstance(fmt, IntFormat)
    return 8 if fmt.bits > 4 else 4 if fmt.bits > 2 else 2


@dataclass(frozen=True)
class PackedIntegers:
    """A weight as `quantized_dense` takes it (zero and sums), or as `packed_dense` does (shift)."""

    words: Tensor
    scale: Tensor
    bits: int
    zero: Tensor | None = None
    sums: Tensor | None = None
    shift: Tensor | None = None


@torch.no_grad()
def integer_weight(layer: QuantizedLayer, as_rows: Callable[[Tensor], Tensor]) -> PackedIntegers:
    """The weight as the layer rounds it, in codes.

    Args:
        layer: for which there is no `problem_of`.
        as_rows: from the shape of the weight to `[columns, inner]`.
    """
    spec: QuantSpec = layer.spec
    site: Site = spec.weight
    weight: Any = layer.weight
    weight = weight.detach()
    require_finite(weight)
    fmt, (columns, inner) = site.format, as_rows(weight).shape
    assert isinstance(fmt, IntFormat)
    groups = 1 if site.granularity.size is None else inner // site.granularity.size
    scale, zero_point = layer.qparams_at("weight", weight)
    if scale is None:
        parts = weight if site.granularity.size is None else weight.view(columns, groups, -1)
        dims = site.granularity.shared_dims(weight.dim())
        scale, zero_point = quantizer_at(site, has_scale=False).dynamic_qparams(parts, dims)
    wide = accumulation_dtype(weight.dtype)
    scale = scale.detach().to(wide).reshape(-1, groups).expand(columns, groups).contiguous()
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.to(wide).reshape(-1, groups).expand_as(scale)
    rounded = as_rows(_rounded(layer, "weight").to(wide)).reshape(columns, groups, inner // groups if groups else 0)
    integers = torch.round(rounded / scale.unsqueeze(-1) + zero.unsqueeze(-1)).view(columns, inner).to(torch.int16)
    if spec.input is None:
        return _for_float_sums(integers, scale, zero, fmt)
    zero = (zero.squeeze(1) - fmt.quant_min).to(torch.int32)
    codes, bits = integers - fmt.quant_min, width_of(fmt)
    sums = codes.sum(1, dtype=torch.int32) - inner * zero
    return PackedIntegers(few_bits.pack(codes.to(torch.uint8), bits), scale.squeeze(1), bits, zero, sums)


def _for_float_sums(integers: Tensor, scale: Tensor, zero: Tensor, fmt: IntFormat) -> PackedIntegers:
    """As `few_bits.float_product` takes them: codes are two's complement, a zero point is a shift of real numbers."""
    bits = max(width_of(fmt), 4)
    codes = (integers & (2**bits - 1)).to(torch.uint8)
    shift = few_bits.pack_columns((zero * scale).float()) if fmt.has_zero_point else None
    return PackedIntegers(few_bits.pack(codes, bits), few_bits.pack_columns(scale.float()), bits, shift=shift)


def _rounded(layer: QuantizedLayer, name: str) -> Tensor:
    """A parameter as the layer rounds it."""
    value: Tensor = getattr(layer, name)
    return quantize_at(getattr(layer.spec, name), value, *layer.qparams_at(name, value))


def rounded_bias(layer: QuantizedLayer) -> nn.Parameter | None:
    """The bias as the layer rounds it; the same Parameter where it is not rounded."""
    bias: Any = layer.bias
    if bias is None or layer.spec.bias is None:
        return bias  # type: ignore[no-any-return]
    with torch.no_grad():
        rounded = _rounded(layer, "bias")
    return nn.Parameter(rounded, requires_grad=bias.requires_grad)


def dynamic_qparams(quantizer: Quantizer[Any], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of an input, taken from it."""
    if x.numel() == 0:  # without a largest element
        one = x.new_ones(())
        return one, one if quantizer.format.has_zero_point else None
    scale, zero_point = quantizer.dynamic_qparams(x, quantizer.granularity.shared_dims(x.dim()))
    assert scale is not None
    return scale, zero_point
