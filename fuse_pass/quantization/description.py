"""What `convert` and `pack` made of a model's layers, as plain data: enough to build the same layers again.

A state dict holds numbers alone. With the description beside it, a float model of the same architecture, also one
without memory (on the meta device), becomes one that the state dict fits:

    [{"kind": "packed", "spec": {...}, "names": ["encoder.layer.0.output.dense", ...]}, ...]

| kind | layer | more |
|---|---|---|
| `quantized` | the Quantized* layer of what is there | `spec` of `spec_as_dict`; dtype and shape of set `scales` |
| `packed` | `PackedLinear` and the others of a float layer | `spec`: the fields of `PackSpec` |
| `packed_quantized` | `PackedQuantizedLinear`, `PackedQuantizedConv2d` | as `quantized` |
| `int8` | `Int8Linear` | `threshold`, and whether `quantize_()` was called |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import nn

from fuse_pass.inductor import private
from fuse_pass.numerics.spec import SITES, QuantSpec
from fuse_pass.numerics.spec_as_dict import spec_as_dict, spec_from_dict
from fuse_pass.quantization import swapping
from fuse_pass.quantization.layers import LAYER_FOR, QuantizedLayer
from fuse_pass.quantization.layers.convolution import QuantizedConv2d
from fuse_pass.quantization.layers.int8_linear import Int8Linear
from fuse_pass.quantization.layers.packed import PackedLayer, PackedLinear, PackedModule
from fuse_pass.quantization.layers.packed_attention import PackedMultiheadAttention
from fuse_pass.quantization.layers.packed_conv2d import PackedConv2d, PackedQuantizedConv2d
from fuse_pass.quantization.layers.packed_embedding import PackedEmbedding
from fuse_pass.quantization.layers.packed_quantized import PackedQuantizedLayer, PackedQuantizedLinear
from fuse_pass.quantization.layers.packed_recurrent import PackedGRU, PackedLSTM, PackedRNN
from fuse_pass.quantization.packing import PackSpec

Groups = list[dict[str, Any]]
KINDS = (QuantizedLayer, PackedModule, Int8Linear)
_PACKED: dict[type[nn.Module], Callable[[Any, PackSpec], PackedModule]] = {
    nn.Linear: PackedLinear.from_float,
    nn.Embedding: PackedEmbedding,
    nn.Conv2d: PackedConv2d,
    nn.MultiheadAttention: PackedMultiheadAttention,
    nn.RNN: PackedRNN,
    nn.LSTM: PackedLSTM,
    nn.GRU: PackedGRU,
}


def describe(model: nn.Module) -> Groups:
    """Every layer of `convert` and `pack` in a model; layers that are alike share an entry."""
    groups: dict[str, dict[str, Any]] = {}
    for name, module in _outermost(model):
        described = _described(module)
        groups.setdefault(json.dumps(described, sort_keys=True), {**described, "names": []})["names"].append(name)
    return list(groups.values())


def rebuild(model: nn.Module, groups: Sequence[Mapping[str, Any]], found: Callable[[str], str | None]) -> nn.Module:
    """Puts the described layers into a float model, in place; their numbers come from a state dict afterwards.

    Args:
        model: of the architecture that was described; what holds no memory (meta) stays so.
        groups: of `describe`.
        found: the name in `model` of a layer that was described; None if the model has no such part.

    Raises:
        ValueError: a description that `describe` does not write, or one of another architecture.
    """
    by_name: dict[str, Mapping[str, Any]] = {}
    for group in groups:
        _require_known(group)
        by_name |= {name: group for described in group["names"] if (name := found(described)) is not None}

    def swap(module: nn.Module, name: str) -> nn.Module:
        group = by_name.pop(name, None)
        if group is None or isinstance(module, KINDS):  # the model's own constructor may put layers of ours
            return module
        try:
            return _BUILDERS[group["kind"]](module, group).train(module.training)
        except TypeError as error:
            raise ValueError(f"{name} was described as {group['kind']}, which does not fit: {error}") from error

    result = swapping.swapped(model, swap)
    if by_name:
        raise ValueError(f"the description names layers that the model does not have: {', '.join(sorted(by_name))}")
    return swapping.finish(result, KINDS)


def finish_loading(model: nn.Module) -> None:
    """For loaders that fill buffers one by one, past `load_state_dict`: its checks, and what no state dict holds.

    Raises:
        ValueError: codes that stand for something else than their layer takes them for, or that were not loaded.
    """
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            try:
                module.finish_loading()
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error


def _outermost(model: nn.Module, name: str = "", seen: set[int] | None = None) -> list[tuple[str, nn.Module]]:
    """The described layers with their names, without their parts; once, where one is used in several places."""
    seen = set() if seen is None else seen
    if id(model) in seen:
        return []
    seen.add(id(model))
    if isinstance(model, KINDS):
        return [(name, model)]
    children = [(f"{name}.{key}" if name else key, child) for key, child in private.children_of(model).items()]
    return [entry for path, child in children if child is not None for entry in _outermost(child, path, seen)]


def _described(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, PackedQuantizedLayer):
        return {"kind": "packed_quantized", **_quantization_of(module)}
    if isinstance(module, PackedModule):
        return {"kind": "packed", "spec": asdict(cast(PackedLinear, module).spec)}
    if isinstance(module, Int8Linear):
        return {"kind": "int8", "threshold": module.threshold, "quantized": module.is_quantized}
    assert isinstance(module, QuantizedLayer)
    return {"kind": "quantized", **_quantization_of(module)}


def _quantization_of(module: QuantizedLayer | PackedQuantizedLayer) -> dict[str, Any]:
    spec: QuantSpec = module.spec
    names = (f"{site}_{part}" for site in SITES for part in ("scale", "zero_point"))
    tensors = {name: value for name in names if (value := getattr(module, name, None)) is not None}
    scales = {name: {"dtype": str(value.dtype)[6:], "shape": list(value.shape)} for name, value in tensors.items()}
    return {"spec": spec_as_dict(spec), "scales": scales}


_FIELDS = {
    "quantized": {"spec", "scales"},
    "packed": {"spec"},
    "packed_quantized": {"spec", "scales"},
    "int8": {"threshold", "quantized"},
}


def _require_known(group: Mapping[str, Any]) -> None:
    kind = group.get("kind")
    if kind not in _FIELDS:
        raise ValueError(f"expected layers of kind {', '.join(_FIELDS)}, got {kind!r}")
    expected = {"kind", "names", *_FIELDS[kind]}
    if set(group) != expected:
        raise ValueError(f"layers of kind {kind!r}: expected {', '.join(sorted(expected))}, got {', '.join(group)}")


def _quantized(module: nn.Module, group: Mapping[str, Any]) -> QuantizedLayer:
    kind = LAYER_FOR.get(type(module))
    if kind is None:
        raise TypeError(f"{type(module).__name__} has no quantised layer")
    layer = kind.from_float(module, spec_from_dict(group["spec"]))
    layer.clear_scales()  # a learned one starts from the weight, and is not always set
    device = next((parameter.device for parameter in layer.parameters()), None)  # None: what a model is built on now

    scales = {
        name: torch.empty(scale["shape"], dtype=getattr(torch, scale["dtype"]), device=device)
        for name, scale in group["scales"].items()
    }
    for site in SITES:
        scale = scales.get(f"{site}_scale")
        if scale is not None:
            layer.set_scale(site, scale, scales.get(f"{site}_zero_point"))
    return layer


def _packed(module: nn.Module, group: Mapping[str, Any]) -> PackedModule:
    build = _PACKED.get(type(module))
    if build is None:
        raise TypeError(f"{type(module).__name__} has no packed layer")
    return build(module, PackSpec(**group["spec"]))


def _packed_quantized(module: nn.Module, group: Mapping[str, Any]) -> PackedModule:
    layer: Any = _quantized(module if type(module) is nn.Conv2d else _linear(module), group)
    for name in ("weight", "bias"):
        _give_placeholder(layer, name)
    return PackedQuantizedConv2d(layer) if isinstance(layer, QuantizedConv2d) else PackedQuantizedLinear(layer)


def _give_placeholder(layer: QuantizedLayer, name: str) -> None:
    """A scale for what is in codes, or rounded, already: a packed layer no longer holds those of its parameters."""
    site, value = getattr(layer.spec, name), getattr(layer, name)
    if site is None or value is None or not site.needs_scale:
        return
    rank = value.dim()
    shared = {dim % rank for dim in site.granularity.shared_dims(rank)}
    sizes = [1 if dim in shared else size for dim, size in enumerate(value.shape)]
    one = torch.ones([] if site.granularity.kind == "tensor" else sizes, device=value.device)
    layer.set_scale(name, one, one if site.format.has_zero_point else None)


def _int8(module: nn.Module, group: Mapping[str, Any]) -> Int8Linear:
    build = Int8Linear.quantized if group["quantized"] else Int8Linear.from_float
    return build(_linear(module), group["threshold"])


def _linear(module: nn.Module) -> nn.Linear:
    if type(module) is not nn.Linear:
        raise TypeError(f"expected an nn.Linear, got a {type(module).__name__}")
    return module


_BUILDERS: dict[str, Callable[[nn.Module, Mapping[str, Any]], nn.Module]] = {
    "quantized": _quantized,
    "packed": _packed,
    "packed_quantized": _packed_quantized,
    "int8": _int8,
}
