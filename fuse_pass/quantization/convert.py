"""`fuse_pass.convert`: swaps the layers of a model for quantised ones, by exact type, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fuse_pass.inductor import private
from fuse_pass.numerics.formats import Format
from fuse_pass.numerics.spec import QuantSpec, spec_of
from fuse_pass.quantization import swapping
from fuse_pass.quantization.layers import LAYER_FOR, QuantizedLayer
from fuse_pass.quantization.layers.base import whole_weight
from fuse_pass.quantization.layers.dropout import Dropping
from fuse_pass.quantization.layers.int8_linear import HasInt8Weights, Int8Linear
from fuse_pass.quantization.layers.packed import PackedModule
from fuse_pass.quantization.names import NameFilter, Names
from fuse_pass.report import Decline, Match, Reason, Report, publish

Spec = QuantSpec | Format | str
LLM_INT8 = "llm_int8"


def convert(
    model: nn.Module,
    spec: Spec | Mapping[str | type[nn.Module], Spec | None] | None,
    *,
    include: Names | None = None,
    exclude: Names | None = None,
    inplace: bool = False,
    learn_scales: bool = False,
) -> nn.Module:
    """Replaces layers by their Quantized* counterparts; `convert(qmodel, None)` goes back.

    Layers are replaced by exact type: a subclass of `nn.Linear` may compute something else and is left alone.
    Parameters are the same objects in the old and the new layer, so tied weights stay tied and an optimizer keeps
    working with `inplace=True`; a module that is used in several places is replaced by one module. What was replaced
    and what was not, and why, goes to every open `fuse_pass.collect()`.

    Dropout is replaced only where a mapping names its type: in evaluation it is the identity, and in training the
    layers around it quantise. `FuseBackend(quantize=spec)` computes the same numbers for the layers that are replaced
    here; its docstring says which, and what it reaches beside them.

    Args:
        model: any module; itself a layer, too.
        spec: a format or its name, a `QuantSpec`, or a mapping from layer types and name patterns (`"encoder.*"`) to
            these: a name wins over a type, an earlier name over a later one, and None leaves the layer alone. None
            instead of all of it goes back to the `torch.nn` layers. "llm_int8" gives every `nn.Linear` int8 weights
            for inference (2208.07339), from which there is no way back.
        include: name patterns of the layers to convert, by default all.
        exclude: name patterns of the layers to leave alone.
        inplace: change `model` instead of a deep copy.
        learn_scales: scales of integer inputs, and of integer weights of more than one dimension in layers that have
            one, become parameters (1902.08153), where the spec leaves their source open; `fuse_pass.calibrate` gives
            those of the inputs their first value.

    Returns:
        The converted model: `model` itself with `inplace=True`, unless it is itself a layer that was replaced.

    Raises:
        ValueError: an unknown format or rounding mode; a pattern that no layer's name matches; a type without a
            quantised layer; `learn_scales` without any integer input or weight.
        TypeError: `model` is no module, or a spec is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected a torch.nn.Module, got {type(model).__name__}")
    chosen = _Choice(spec, include, exclude, learn_scales=learn_scales)
    chosen.require_names_of(model)
    model = model if inplace else copy.deepcopy(model)
    report = Report()
    converted = swapping.swapped(model, lambda module, name: _swapped(module, name, chosen, report))
    publish(report)
    return swapping.finish(converted, (QuantizedLayer, Int8Linear, PackedModule))


def _swapped(module: nn.Module, name: str, chosen: _Choice, report: Report) -> nn.Module:
    if chosen.to_float:
        is_quantized = isinstance(module, QuantizedLayer) and chosen.names.allows(name)
        return module.to_float() if is_quantized else module  # type: ignore[operator]
    if chosen.llm_int8:
        return _with_int8_weights(module, name, chosen, report)
    if isinstance(module, QuantizedLayer):
        return _declined(module, name, report, Reason.OVERLAP, "is quantised already")
    layer = LAYER_FOR.get(type(module))
    if layer is None:
        if not private.children_of(module) and (
            list(module.parameters(recurse=False)) or isinstance(module, tuple(LAYER_FOR))
        ):
            detail = f"{type(module).__name__} has no quantised layer"
            return _declined(module, name, report, Reason.NO_QUANTIZED_LAYER, detail)
        return module
    if issubclass(layer, Dropping) and not chosen.names_type_of(module):
        return module
    spec = chosen.spec_for(module, name)
    if spec is None:
        return _declined(module, name, report, Reason.EXCLUDED, "the caller left it out")
    report.matches.append(Match("convert", f"{layer.__name__}, {spec}", name, "", ""))
    return layer.from_float(module, spec)


def _with_int8_weights(module: nn.Module, name: str, chosen: _Choice, report: Report) -> nn.Module:
    if type(module) is not nn.Linear and not HasInt8Weights.is_own_class_of(module):
        return module
    if not chosen.names.allows(name):
        return _declined(module, name, report, Reason.EXCLUDED, "the caller left it out")
    report.matches.append(Match("convert", LLM_INT8, name, "", ""))
    if isinstance(module, HasInt8Weights):
        return module.quantize_()
    return Int8Linear.quantized(module)  # type: ignore[arg-type]


def _declined(module: nn.Module, name: str, report: Report, reason: Reason, detail: str) -> nn.Module:
    report.declines.append(Decline("convert", reason, detail, name, "", ""))
    return module


class _Choice:
    """Which layer gets which spec."""

    def __init__(self, spec: Any, include: Names | None, exclude: Names | None, *, learn_scales: bool = False) -> None:
        self.to_float = spec is None
        self.llm_int8 = isinstance(spec, str) and spec == LLM_INT8
        self.names = NameFilter("convert", include, exclude)
        self._default: QuantSpec | None = None
        self._by_name: dict[str, QuantSpec | None] = {}
        self._by_type: dict[type, QuantSpec | None] = {}
        if isinstance(spec, Mapping):
            for key, value in spec.items():
                self._add(key, None if value is None else spec_of(value))
        elif spec is not None and not self.llm_int8:
            self._default = spec_of(spec)
        self._learn_scales = learn_scales
        if learn_scales:
            specs = (self._default, *self._by_name.values(), *self._by_type.values())
            sites = [site for spec in specs if spec is not None for site in (spec.input, spec.weight)]
            if not any(site is not None and site.may_learn_scale for site in sites):
                raise ValueError("convert: learn_scales needs an integer format for inputs or weights, e.g. 'int8'")

    def _add(self, key: Any, spec: QuantSpec | None) -> None:
        if isinstance(key, str):
            self._by_name[key] = spec
        elif isinstance(key, type) and key in LAYER_FOR:
            self._by_type[key] = spec
        elif isinstance(key, type):
            names = ", ".join(layer.__name__ for layer in LAYER_FOR)
            raise ValueError(f"convert: {key.__name__} has no quantised layer; these types have: {names}")
        else:
            raise TypeError(f"convert: expected layer types and names as keys of the mapping, got {key!r}")

    def names_type_of(self, module: nn.Module) -> bool:
        return type(module) in self._by_type

    def spec_for(self, module: nn.Module, name: str) -> QuantSpec | None:
        if not self.names.allows(name):
            return None
        spec = self._by_type.get(type(module), self._default)
        for pattern, by_name in self._by_name.items():
            if fnmatchcase(name, pattern):
                spec = by_name
                break
        return _learning(spec, module) if self._learn_scales and spec is not None else spec

    def require_names_of(self, model: nn.Module) -> None:
        self.names.require_names_of(model, self._by_name)


def _learning(spec: QuantSpec, module: nn.Module) -> QuantSpec:
    """The spec with learned scales where one tensor with several elements per scale stands behind a site."""
    if spec.input is not None and spec.input.may_learn_scale and spec.input.granularity.kind == "tensor":
        spec = replace(spec, input=replace(spec.input, scale="learned"))
    if spec.weight is None or not spec.weight.may_learn_scale:
        return spec
    weight = whole_weight(module, spec.weight)
    has_scales_to_learn = weight is not None and weight.dim() > 1
    return replace(spec, weight=replace(spec.weight, scale="learned")) if has_scales_to_learn else spec
