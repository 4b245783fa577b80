"""A converted Linear that holds its weight in few bits and sums integers; made by `fuse_pass.pack`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuse_pass.kernels import few_bits
from fuse_pass.numerics.formats import Format, Granularity, IntFormat
from fuse_pass.numerics.rounding import STOCHASTIC
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.numerics.tensors import accumulation_dtype
from fuse_pass.ops.packed_dense import WEIGHT_ONLY, PackedWeight, packed_dense
from fuse_pass.ops.quantized_dense import IntegerWeight, max_inner, quantized_dense
from fuse_pass.quantization.functional import quantize_at, quantizer_at
from fuse_pass.quantization.layers.base import quantize_gradient
from fuse_pass.quantization.layers.linear import QuantizedLinear
from fuse_pass.quantization.layers.packed import PackedLinearLayer
from fuse_pass.quantization.packing import TABLES, require_finite
from fuse_pass.quantization.quantizers import Quantizer

_ROWS = (Granularity("tensor"), Granularity("token"), Granularity("channel", axis=0), Granularity("channel", axis=-2))


class PackedQuantizedLinear(PackedLinearLayer):
    """`[..., in_features] → [..., out_features]`: what a `QuantizedLinear` computes, by sums of integers.

    The input is rounded to integers as the site of the `QuantizedLinear` says, with the scale that it has or one of
    each tensor or token; see `fuse_pass.ops.quantized_dense`. Without a site for the input the weight alone is in few
    bits. The bias is rounded once and for all, the output in every call. Results are those of the `QuantizedLinear` up
    to the rounding of sums (d_in + 8 roundings of float32, for half types also that of its rounded operands).

    The state dict holds `words` and `scale` of the weight, `zero` and `sums` or `shift`, `input_scale`,
    `input_zero_point`, `output_scale` and `output_zero_point` where these were set, `bias`, and `packed_format`.

    Raises:
        ValueError: a `QuantizedLinear` for which `problem_of` names a problem, or a weight with NaN or infinity.
    """

    zero: Tensor | None
    sums: Tensor | None
    shift: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    output_scale: Tensor | None
    output_zero_point: Tensor | None
    table: Tensor | None

    def __init__(self, layer: QuantizedLinear) -> None:
        problem = problem_of(layer)
        if problem:
            raise ValueError(f"pack: {problem}")
        spec: QuantSpec = layer.spec
        weight = _integer_weight(layer)
        super().__init__(layer.in_features, layer.out_features, _content_of(spec), weight.words, _rounded_bias(layer))
        self.spec = spec
        self._bits = weight.bits
        is_looked_up = spec.input is None and weight.bits == 4
        table = torch.tensor(TABLES["int4"], dtype=torch.float32, device=weight.words.device) if is_looked_up else None
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("sums", weight.sums)
        self.register_buffer("shift", weight.shift)
        for name in ("input", "output"):
            site: Site | None = getattr(spec, name)
            qparams = (None, None) if site is None else layer.qparams_at(name, weight.scale)
            for part, value in zip(("scale", "zero_point"), qparams, strict=True):
                self.register_buffer(f"{name}_{part}", None if value is None else value.detach().clone())
        has_scale = self.input_scale is not None
        self._quantizer = None if spec.input is None else quantizer_at(spec.input, has_scale=has_scale)
        self.train(layer.training)

    @property
    def is_weight_only(self) -> bool:
        """Whether inputs stay as they are, and are not rounded to integers."""
        return self._quantizer is None

    @property
    def bits(self) -> int:
        """Of a packed code."""
        return self._bits

    @property
    def is_integer(self) -> bool:
        """Whether codes stand for integers times a scale: always."""
        return True

    def real_weight(self) -> Tensor:
        weight = self._weight()
        is_integer = self._quantizer is not None
        return (IntegerWeight(*weight) if is_integer else PackedWeight(*weight)).real(self.in_features)

    def _weight(self) -> tuple[Any, ...]:
        if self._quantizer is None:
            return self.words, self.scale, self.shift, self.table, WEIGHT_ONLY, self._bits, self.out_features
        return self.words, self.scale, self.zero, self.sums, self._bits, self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of x; raises what `nn.Linear` raises for an x that does not fit."""
        self._check_input(x)
        quantizer = self._quantizer
        if quantizer is None:
            y = packed_dense(x, self._weight(), self.bias, 0.0)
        else:
            scale, zero_point = self.input_scale, self.input_zero_point
            if scale is None:
                scale, zero_point = _dynamic_qparams(quantizer, x)
            fmt = quantizer.format
            how = (fmt.quant_min, fmt.quant_max, quantizer.rounding, quantizer.clip_grad)
            y = quantized_dense(x, scale, zero_point, self._weight(), self.bias, how)
        y = quantize_at(self.spec.output, y, self.output_scale, self.output_zero_point)
        return y if self.spec.grad is None else quantize_gradient(y, self.spec.grad)

    def _described(self, content: bytes) -> object:
        return _read(content)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec}"


def problem_of(layer: QuantizedLinear) -> str:
    """Why a layer cannot be packed to what it computes; empty where it can."""
    spec: QuantSpec = layer.spec
    if spec.weight is None:
        return "its weight is not quantised"
    if layer.weight.numel() == 0:
        return "its weight is empty, and has no scale"
    problem = _problem_of_weight(spec.weight, layer.in_features, has_input=spec.input is not None)
    if not problem and spec.input is not None:
        problem = _problem_of_input(spec.input, spec.weight, layer.in_features)
    return problem or _problem_of_scales(layer)


def _problem_of_weight(site: Site, inner: int, *, has_input: bool) -> str:
    if not _has_codes(site.format):
        return f"weights of {site.format.name} are no integers of 2 to 8 bits"
    if site.rounding in STOCHASTIC:
        return "its weight is rounded at random in every call"
    size = site.granularity.size
    if size is None:
        return "" if site.granularity in _ROWS else f"its weight is scaled by {site.granularity.kind}, and not by row"
    if has_input:
        return "sums of integers over groups that have scales of their own are not supported; leave the input as it is"
    if inner % size or size % (32 // _width(site.format)):
        return f"groups of {size} do not divide {inner} inputs, or are no multiple of {32 // _width(site.format)}"
    return ""


def _problem_of_input(site: Site, weight: Site, inner: int) -> str:
    if not _has_codes(site.format):
        return f"inputs of {site.format.name} are no integers of 2 to 8 bits"
    if site.rounding in STOCHASTIC:
        return "its input is rounded at random"
    if site.granularity.kind not in ("tensor", "token"):
        return f"its input is scaled by {site.granularity.kind}, and not by row"
    largest = max_inner(_width(weight.format), has_zero_point=site.format.has_zero_point)
    return "" if inner <= largest else f"at most {largest} products are summed exactly in int32, not {inner}"


def _problem_of_scales(layer: QuantizedLinear) -> str:
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


def _has_codes(fmt: Format) -> bool:
    return isinstance(fmt, IntFormat) and fmt.bits <= 8


def _width(fmt: Format) -> int:
    """Bits of a packed code."""
    assert isinstance(fmt, IntFormat)
    return 8 if fmt.bits > 4 else 4 if fmt.bits > 2 else 2


@dataclass(frozen=True)
class _PackedIntegers:
    """A weight as `quantized_dense` takes it (zero and sums), or as `packed_dense` does (shift)."""

    words: Tensor
    scale: Tensor
    bits: int
    zero: Tensor | None = None
    sums: Tensor | None = None
    shift: Tensor | None = None


@torch.no_grad()
def _integer_weight(layer: QuantizedLinear) -> _PackedIntegers:
    """The weight as the layer rounds it, in codes."""
    site: Site = layer.spec.weight
    weight = layer.weight.detach()
    require_finite(weight)
    fmt, (columns, inner) = site.format, weight.shape
    assert isinstance(fmt, IntFormat)
    groups = 1 if site.granularity.size is None else inner // site.granularity.size
    scale, zero_point = layer.qparams_at("weight", weight)
    if scale is None:
        parts = weight if groups == 1 and site.granularity.size is None else weight.view(columns, groups, -1)
        dims = site.granularity.shared_dims(2)
        scale, zero_point = quantizer_at(site, has_scale=False).dynamic_qparams(parts, dims)
    wide = accumulation_dtype(weight.dtype)
    scale = scale.detach().to(wide).reshape(-1, groups).expand(columns, groups).contiguous()
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.to(wide).reshape(-1, groups).expand_as(scale)
    rounded = _rounded(layer, "weight").to(wide).view(columns, groups, inner // groups if groups else 0)
    integers = torch.round(rounded / scale.unsqueeze(-1) + zero.unsqueeze(-1)).view(columns, inner).to(torch.int16)
    if layer.spec.input is None:
        return _for_float_sums(integers, scale, zero, fmt)
    zero = (zero.squeeze(1) - fmt.quant_min).to(torch.int32)
    codes, bits = integers - fmt.quant_min, _width(fmt)
    sums = codes.sum(1, dtype=torch.int32) - inner * zero
    return _PackedIntegers(few_bits.pack(codes.to(torch.uint8), bits), scale.squeeze(1), bits, zero, sums)


def _for_float_sums(integers: Tensor, scale: Tensor, zero: Tensor, fmt: IntFormat) -> _PackedIntegers:
    """As `few_bits.float_product` takes them: codes are two's complement, a zero point is a shift of real numbers."""
    bits = max(_width(fmt), 4)
    codes = (integers & (2**bits - 1)).to(torch.uint8)
    shift = few_bits.pack_columns((zero * scale).float()) if fmt.has_zero_point else None
    return _PackedIntegers(few_bits.pack(codes, bits), few_bits.pack_columns(scale.float()), bits, shift=shift)


def _rounded(layer: QuantizedLinear, name: str) -> Tensor:
    """A parameter as the layer rounds it."""
    value: Tensor = getattr(layer, name)
    return quantize_at(getattr(layer.spec, name), value, *layer.qparams_at(name, value))


def _rounded_bias(layer: QuantizedLinear) -> nn.Parameter | None:
    """The same Parameter where it is not rounded."""
    if layer.bias is None or layer.spec.bias is None:
        return layer.bias
    with torch.no_grad():
        rounded = _rounded(layer, "bias")
    return nn.Parameter(rounded, requires_grad=layer.bias.requires_grad)


def _dynamic_qparams(quantizer: Quantizer[Any], x: Tensor) -> tuple[Tensor, Tensor | None]:
    if x.numel() == 0:  # without a largest element
        one = x.new_ones(())
        return one, one if quantizer.format.has_zero_point else None
    scale, zero_point = quantizer.dynamic_qparams(x, quantizer.granularity.shared_dims(x.dim()))
    assert scale is not None
    return scale, zero_point


# Another number where packed weights of before would be read wrongly.
_VERSION = 1


def _content_of(spec: QuantSpec) -> bytes:
    return json.dumps({"version": _VERSION, "quantized": repr(spec)}, sort_keys=True).encode()


def _read(content: bytes) -> str:
    """The other way.

    Raises:
        ValueError: nothing that `_content_of` of this version writes.
    """
    try:
        fields = dict(json.loads(content))
        version, described = fields["version"], str(fields["quantized"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"packed_format: expected that of a packed Quantized layer, got {content[:80]!r}") from error
    if version != _VERSION:
        raise ValueError(f"packed_format: expected version {_VERSION}, got {version!r}; pack the model again")
    return described
