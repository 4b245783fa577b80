"""`fuse_pass.pack`: swaps Linear layers for ones that hold their weights in few bits, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from fuse_pass.inductor import private
from fuse_pass.numerics import bit_codes
from fuse_pass.quantization.layers import QuantizedLayer
from fuse_pass.quantization.layers.bit_linear import BitLinear
from fuse_pass.quantization.layers.int8_linear import Int8Linear
from fuse_pass.quantization.layers.packed import PackedLinear
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
    """Replaces Linear layers by ones that hold their weights in few bits and multiply by those; for inference.

    Layers that are quantised already, `BitLinear` and `Int8Linear`, are packed to what they compute, whatever the spec
    says: the packed layer gives the same results (of an `Int8Linear` those after `quantize_()`). `nn.Linear` is
    replaced by exact type, where a spec is given. What was packed and what was not, and why, goes to every open
    `fuse_pass.collect()`.

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

    def swapped(module: nn.Module, name: str) -> nn.Module:
        new, decline = _packed(module, chosen) if names.allows(name) else (module, _excluded(module))
        if new is not module:
            report.matches.append(Match("pack", str(getattr(new, "spec", "")), name, "", ""))
        elif decline is not None:
            report.declines.append(Decline("pack", *decline, name, "", ""))
        return new

    result = _replaced(model if inplace else copy.deepcopy(model), "", swapped, {})
    publish(report)
    return result


def unpack(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replaces every `PackedLinear` by an `nn.Linear` with the real numbers that its codes stand for.

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

    def swapped(module: nn.Module, name: str) -> nn.Module:
        return module.to_float() if isinstance(module, PackedLinear) else module

    return _replaced(model if inplace else copy.deepcopy(model), "", swapped, {})


_Swap = Callable[[nn.Module, str], nn.Module]
_Decline = tuple[Reason, str]


def _replaced(module: nn.Module, name: str, swap: _Swap, twins: dict[int, nn.Module]) -> nn.Module:
    """The module with each layer that `swap` replaces replaced, those inside it included."""
    if id(module) in twins:
        return twins[id(module)]
    new = swap(module, name)
    twins[id(module)] = new
    if new is module:
        for child_name, child in list(private.children_of(module).items()):
            if child is not None:
                path = f"{name}.{child_name}" if name else child_name
                private.children_of(module)[child_name] = _replaced(child, path, swap, twins)
    return new


def _spec_of(spec: PackSpec | str | None) -> PackSpec | None:
    if spec is None or isinstance(spec, PackSpec):
        return spec
    if not isinstance(spec, str):
        names = ", ".join(map(repr, SPECS))
        raise TypeError(f"pack: expected a fuse_pass.PackSpec or one of {names}, got {spec!r}")
    return PackSpec(spec)


def _packed(module: nn.Module, spec: PackSpec | None) -> tuple[nn.Module, _Decline | None]:
    """The packed layer, or the module itself and why it stays; None where that goes without saying."""
    if isinstance(module, PackedLinear):
        return module, (Reason.OVERLAP, "is packed already")
    if type(module) is BitLinear:
        return _of_bit_linear(module), None
    if type(module) is Int8Linear:
        return _of_int8_linear(module), None
    if isinstance(module, QuantizedLayer):
        return module, (Reason.NO_QUANTIZED_LAYER, f"{type(module).__name__} has no packed layer")
    if type(module) is not nn.Linear or spec is None:
        weight = private.parameters_of(module).get("weight")
        has_weight = weight is not None and weight.dim() > 1
        if spec is None or not has_weight:
            return module, None
        return module, (Reason.NO_QUANTIZED_LAYER, f"{type(module).__name__} has no packed layer")
    if private.parameters_of(module).get("weight") is None:
        return module, (Reason.NO_QUANTIZED_LAYER, "its weight is computed (parametrized, pruned)")
    return PackedLinear.from_float(module, spec), None


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
    is_packable = type(module) in (nn.Linear, BitLinear, Int8Linear)
    return (Reason.EXCLUDED, "the caller left it out") if is_packable else None
