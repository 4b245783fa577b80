"""Converted Linear and Conv2d layers that hold their weight in few bits and sum integers; made by `fuse_pass.pack`."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from fuse_pass.numerics.formats import Granularity
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.ops.packed_dense import WEIGHT_ONLY, PackedWeight, packed_dense
from fuse_pass.ops.quantized_dense import IntegerWeight, quantized_dense
from fuse_pass.quantization import integer_weights
from fuse_pass.quantization.functional import quantize_at, quantizer_at
from fuse_pass.quantization.integer_weights import PackedIntegers
from fuse_pass.quantization.layers.base import QuantizedLayer, quantize_gradient
from fuse_pass.quantization.layers.linear import QuantizedLinear
from fuse_pass.quantization.layers.packed import PackedLayer, PackedLinearLayer


class PackedQuantizedLayer(PackedLayer):
    """What converted layers with a packed weight have in common: the sites of the layer they were made of.

    The state dict holds `words` and `scale` of the weight, `zero` and `sums` or `shift`, `input_scale`,
    `input_zero_point`, `output_scale` and `output_zero_point` where these were set, `bias`, and `packed_format`.
    """

    spec: QuantSpec
    zero: Tensor | None
    sums: Tensor | None
    shift: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    output_scale: Tensor | None
    output_zero_point: Tensor | None

    def _take_sites(self, layer: QuantizedLayer, weight: PackedIntegers, columns: int) -> None:
        """Everything but words and bias."""
        spec: QuantSpec = layer.spec
        self.spec, self._bits, self._columns = spec, weight.bits, columns
        is_looked_up = spec.input is None and weight.bits == 4
        self._register_table("int4" if is_looked_up else "")
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

    def _real_rows(self, inner: int) -> Tensor:
        weight = self._weight()
        return (PackedWeight(*weight) if self._quantizer is None else IntegerWeight(*weight)).real(inner)

    def _weight(self) -> tuple[Any, ...]:
        """Arguments of an `IntegerWeight`, or without an input site of a `PackedWeight`."""
        if self._quantizer is None:
            return self.words, self.scale, self.shift, self.table, WEIGHT_ONLY, self._bits, self._columns
        return self.words, self.scale, self.zero, self.sums, self._bits, self._columns

    def _input_qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
        """Scale, zero point and the arguments of an `InputRounding`."""
        quantizer = self._quantizer
        assert quantizer is not None
        scale, zero_point = self.input_scale, self.input_zero_point
        if scale is None:
            scale, zero_point = integer_weights.dynamic_qparams(quantizer, x)
        fmt = quantizer.format
        return scale, zero_point, (fmt.quant_min, fmt.quant_max, quantizer.rounding, quantizer.clip_grad)

    def _rounded(self, y: Tensor) -> Tensor:
        y = quantize_at(self.spec.output, y, self.output_scale, self.output_zero_point)
        return y if self.spec.grad is None else quantize_gradient(y, self.spec.grad)

    def _described(self, content: bytes) -> object:
        return _read(content)


_ROWS = (Granularity("tensor"), Granularity("token"), Granularity("channel", axis=0), Granularity("channel", axis=-2))
_INPUT_ROWS = (Granularity("tensor"), Granularity("token"))


class PackedQuantizedLinear(PackedQuantizedLayer, PackedLinearLayer):
    """`[..., in_features] → [..., out_features]`: what a `QuantizedLinear` computes, by sums of integers.

    The input is rounded to integers as the site of the `QuantizedLinear` says, with the scale that it has or one of
    each tensor or token; see `fuse_pass.ops.quantized_dense`. Without a site for the input the weight alone is in few
    bits. The bias is rounded once and for all, the output in every call. Results are those of the `QuantizedLinear` up
    to the rounding of sums (d_in + 8 roundings of float32, for half types also that of its rounded operands).

    Raises:
        ValueError: a `QuantizedLinear` for which `problem_of` names a problem, or a weight with NaN or infinity.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        problem = problem_of_linear(layer)
        if problem:
            raise ValueError(f"pack: {problem}")
        weight = integer_weights.integer_weight(layer, lambda weight: weight)
        bias = integer_weights.rounded_bias(layer)
        super().__init__(layer.in_features, layer.out_features, content_of(layer.spec), weight.words, bias)
        self._take_sites(layer, weight, layer.out_features)

    def real_weight(self) -> Tensor:
        return self._real_rows(self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of x; raises what `nn.Linear` raises for an x that does not fit."""
        self._check_input(x)
        if self._quantizer is None:
            return self._rounded(packed_dense(x, self._weight(), self.bias, 0.0))
        scale, zero_point, how = self._input_qparams(x)
        return self._rounded(quantized_dense(x, scale, zero_point, self._weight(), self.bias, how))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec}"


def problem_of_linear(layer: QuantizedLinear) -> str:
    """Why a layer cannot be packed to what it computes; empty where it can."""
    return integer_weights.problem_of(layer, layer.in_features, _ROWS, _INPUT_ROWS)


# Another number where packed weights of before would be read wrongly.
_VERSION = 1


def content_of(spec: QuantSpec) -> bytes:
    return json.dumps({"version": _VERSION, "quantized": repr(spec)}, sort_keys=True).encode()


def _read(content: bytes) -> str:
    """The other way.

    Raises:
        ValueError: nothing that `content_of` of this version writes.
    """
    try:
        fields = dict(json.loads(content))
        version, described = fields["version"], str(fields["quantized"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"packed_format: expected that of a packed Quantized layer, got {content[:80]!r}") from error
    if version != _VERSION:
        raise ValueError(f"packed_format: expected version {_VERSION}, got {version!r}; pack the model again")
    return described
