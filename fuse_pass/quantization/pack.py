"""`fuse_pass.pack`: swaps Linear layers for ones that hold their weights in few bits, and back."""

from __future__ import annotations

import copy

from torch import nn

from fuse_pass.inductor import private
from fuse_pass.numerics import bit_codes
from fuse_pass.ops.packed_dense import INT8, LLM_INT8, WEIGHT_ONLY
from fuse_pass.quantization import swapping
from fuse_pass.quantization.layers import QuantizedLayer
from fuse_pass.quantization.layers.bit_linear import BitLinear
from fuse_pass.quantization.layers.int8_linear import Int8Linear
from fuse_pass.quantization.layers.linear import QuantizedLinear
from fuse_pass.quantization.layers.packed import PackedLayer, PackedLinear
from fuse_pass.quantization.layers.packed_embedding import PackedEmbedding
from fuse_pass.quantization.layers.packed_quantized import PackedQuantizedLinear, problem_of
from fuse_pass.quantization.names import NameFilter, Names
from fuse_pass.quantization.packing import SPECS, Packed, PackSpec, of_integers
from fuse_pass.report import Decline, Match, Reason, Report, publish


def pack(
    model: nn.Module,
    spec: PackSpec | str | None = None,
    *,
    include: Names | None = None,
    exclude: Names | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replaces Linear and Embedding layers by ones that hold their weights in few bits, and multiply by those.

    For inference.

    Layers that are quantised already, `BitLinear`, `Int8Linear` and the `QuantizedLinear` of `convert`, are packed to
    what they compute, whatever the spec says: the packed layer gives the same results (of an `Int8Linear` those after
    `quantize_()`, of a `QuantizedLinear` up to the rounding of sums). `nn.Linear` and `nn.Embedding` are replaced by
    exact type, where a spec is given; tables by their weight alone ("int8" and "llm_int8" make "int8_weight_only" of
    them). What was packed and what was not, and why, goes to every open `fuse_pass.collect()`.

    A layer that is used in several places is replaced by one layer; one whose weight another layer uses too (tied
    embeddings) gets packed codes of its own, and the weight stays with the other.

    Args:
        model: any module; itself a layer, too.
        spec: a `PackSpec` or the name of one: "int8", "int8_weight_only", "int4_weight_only", "nf4", "fp4",
            "llm_int8", "b1" or "b1.58". None packs only what is quantised already.
        include: name patterns of the layers to pack, by default all.
        exclude: name patterns of the layers to leave alone.
        inplace: change `model` instead of a deep copy.

    Returns:
        The packed model: `model` itself with `inplace=True`, unless it is itself a layer that was replaced.

    Raises:
        ValueError: an unknown spec; a pattern that no layer's name matches; a weight with NaN or infinity.
        TypeError: `model` is no module, or a spec is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pack: expected a torch.nn.Module, got {type(model).__name__}")
    chosen, names = _spec_of(spec), NameFilter("pack", include, exclude)
    names.require_names_of(model)
    report = Report()

    def swap(module: nn.Module, name: str) -> nn.Module:
        new, decline = _packed(module, chosen) if names.allows(name) else (module, _excluded(module))
        if new is not module:
            report.matches.append(Match("pack", str(getattr(new, "spec", "")), name, "", ""))
        elif decline is not None:
            report.declines.append(Decline("pack", *decline, name, "", ""))
        return new

    result = swapping.swapped(model if inplace else copy.deepcopy(model), swap)
    publish(report)
    return swapping.finish(result, _GUARDED)


def unpack(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replaces every packed layer by an `nn.Linear` with the real numbers that its codes stand for.

    What packing rounded away does not come back; inputs are no longer rounded.

    Args:
        model: any module; itself a layer, too.
        inplace: change `model` instead of a deep copy.

    Returns:
        The model with float weights, as `pack` returns its own.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpack: expected a torch.nn.Module, got {type(model).__name__}")

    def swap(module: nn.Module, name: str) -> nn.Module:
        return module.to_float() if isinstance(module, PackedLayer) else module

    result = swapping.swapped(model if inplace else copy.deepcopy(model), swap)
    return swapping.finish(result, _GUARDED)


_Decline = tuple[Reason, str]
_GUARDED = (PackedLayer, QuantizedLayer, Int8Linear)


def _spec_of(spec: PackSpec | str | None) -> PackSpec | None:
    if spec is None or isinstance(spec, PackSpec):
        return spec
    if not isinstance(spec, str):
        names = ", ".join(map(repr, SPECS))
        raise TypeError(f"pack: expected a fuse_pass.PackSpec or one of {names}, got {spec!r}")
    return PackSpec(spec)


def _packed(module: nn.Module, spec: PackSpec | None) -> tuple[nn.Module, _Decline | None]:
    """The packed layer, or the module itself and why it stays; None where that goes without saying."""
    if isinstance(module, PackedLayer):
        return module, (Reason.OVERLAP, "is packed already")
    if isinstance(module, QuantizedLayer):
        return _of_quantized_layer(module)
    kind = type(module)
    if kind not in (BitLinear, Int8Linear) and (spec is None or kind not in (nn.Linear, nn.Embedding)):
        weight = private.parameters_of(module).get("weight")
        has_weight = isinstance(module, (nn.Linear, nn.Embedding)) or (weight is not None and weight.dim() > 1)
        is_asked = spec is not None and has_weight
        return module, (Reason.NO_QUANTIZED_LAYER, f"{kind.__name__} has no packed layer") if is_asked else None
    problem = _problem_of_tensors(module)
    if problem:
        return module, (Reason.NO_QUANTIZED_LAYER, problem)
    if isinstance(module, BitLinear):
        return _of_bit_linear(module), None
    if isinstance(module, Int8Linear):
        return _of_int8_linear(module), None
    assert spec is not None
    if isinstance(module, nn.Embedding):
        return _of_embedding(module, spec)
    assert isinstance(module, nn.Linear)
    return PackedLinear.from_float(module, spec), None


def _of_embedding(module: nn.Embedding, spec: PackSpec) -> tuple[nn.Module, _Decline | None]:
    """Nothing is multiplied, so that only the weight can be in few bits."""
    if module.max_norm is not None:
        return module, (Reason.NO_QUANTIZED_LAYER, "its table is written to in every call (max_norm)")
    chosen = PackSpec("int8_weight_only") if spec.name in (INT8, LLM_INT8) else spec
    if chosen.kind != WEIGHT_ONLY:
        return module, (Reason.NO_QUANTIZED_LAYER, f"an Embedding has no packed layer of {spec.name}")
    return PackedEmbedding(module, chosen), None


def _of_quantized_layer(module: QuantizedLayer) -> tuple[nn.Module, _Decline | None]:
    if type(module) is not QuantizedLinear:
        return module, (Reason.NO_QUANTIZED_LAYER, f"{type(module).__name__} has no packed layer")
    problem = _problem_of_tensors(module) or problem_of(module)
    return (module, (Reason.NO_QUANTIZED_LAYER, problem)) if problem else (PackedQuantizedLinear(module), None)


def _problem_of_tensors(module: nn.Module) -> str:
    if "forward" in vars(module):
        return "its forward was replaced"
    return "" if _has_weight_of_its_own(module) else "its weight is computed (pruned)"


def _has_weight_of_its_own(module: nn.Module) -> bool:
    """A Parameter, or what a layer that is packed or quantised already keeps instead."""
    names = {*private.parameters_of(module), *private.buffers_of(module)}
    if isinstance(module, BitLinear) and module.is_packed:
        return True
    return "weight" in names


def _of_bit_linear(layer: BitLinear) -> PackedLinear:
    source = layer
    if not layer.is_packed:
        source = private.with_own_tensors(layer)
        source.pack()
    assert source.weight_packed is not None
    assert source.weight_scale is not None
    codes = bit_codes.unpack_codes(source.weight_packed, layer.in_features, layer.variant)
    scale = bit_codes.per_row(source.weight_scale, layer.out_features).contiguous()
    return _layer(layer, PackSpec(layer.variant), of_integers(codes, scale, layer.variant))


def _of_int8_linear(layer: Int8Linear) -> PackedLinear:
    source = layer
    if not layer.is_quantized:
        source = private.with_own_tensors(layer)
        source.quantize_()
    assert source.weight_scale is not None
    spec = PackSpec("llm_int8", threshold=layer.threshold)
    return _layer(layer, spec, of_integers(source.weight.detach(), source.weight_scale, spec.name))


def _layer(old: BitLinear | Int8Linear, spec: PackSpec, weight: Packed) -> PackedLinear:
    return PackedLinear(old.in_features, old.out_features, spec, weight, old.bias).train(old.training)


def _excluded(module: nn.Module) -> _Decline | None:
    is_packable = type(module) in (nn.Linear, nn.Embedding, BitLinear, Int8Linear, QuantizedLinear)
    return (Reason.EXCLUDED, "the caller left it out") if is_packable else None
