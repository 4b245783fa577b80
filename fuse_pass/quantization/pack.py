"""`fuse_pass.pack`: swaps layers for ones that hold their weights in few bits, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from fuse_pass.inductor import private
from fuse_pass.numerics import bit_codes
from fuse_pass.ops.packed_dense import INT8, LLM_INT8, WEIGHT_ONLY
from fuse_pass.quantization import swapping
from fuse_pass.quantization.layers import QuantizedLayer
from fuse_pass.quantization.layers.bit_linear import BitLinear
from fuse_pass.quantization.layers.convolution import QuantizedConv2d
from fuse_pass.quantization.layers.int8_linear import Int8Linear
from fuse_pass.quantization.layers.linear import QuantizedLinear
from fuse_pass.quantization.layers.packed import PackedLinear, PackedModule
from fuse_pass.quantization.layers.packed_attention import PackedMultiheadAttention
from fuse_pass.quantization.layers.packed_conv2d import (
    INT8_SPEC,
    PackedConv2d,
    PackedQuantizedConv2d,
    problem_of_conv2d,
)
from fuse_pass.quantization.layers.packed_embedding import PackedEmbedding
from fuse_pass.quantization.layers.packed_quantized import PackedQuantizedLinear, problem_of_linear
from fuse_pass.quantization.layers.packed_recurrent import PackedGRU, PackedLSTM, PackedRNN, names_of_weights
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
    """Replaces layers with weights by ones that hold these in few bits, and multiply by them. For inference.

    Layers that are quantised already, `BitLinear`, `Int8Linear`, and `QuantizedLinear` and `QuantizedConv2d` of
    `convert`, are packed to what they compute, whatever the spec says: the packed layer gives the same results (of an
    `Int8Linear` those after `quantize_()`, of those of `convert` up to the rounding of sums).

    Where a spec is given, layers in floating point are replaced by exact type: `nn.Linear`; the projections of
    `nn.MultiheadAttention`; the products of `nn.LSTM`, `nn.GRU` and `nn.RNN`, whose gates and states stay as they are;
    `nn.Conv2d` by "int8", with a scale for each image, and by specs of the weight alone; `nn.Embedding` by its weight
    alone ("int8" and "llm_int8" make "int8_weight_only" of it). What was packed and what was not, and why, goes to
    every open `fuse_pass.collect()`.

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
        return module.to_float() if isinstance(module, PackedModule) else module

    result = swapping.swapped(model if inplace else copy.deepcopy(model), swap)
    return swapping.finish(result, _GUARDED)


_Decline = tuple[Reason, str]
_GUARDED = (PackedModule, QuantizedLayer, Int8Linear)


def _spec_of(spec: PackSpec | str | None) -> PackSpec | None:
    if spec is None or isinstance(spec, PackSpec):
        return spec
    if not isinstance(spec, str):
        names = ", ".join(map(repr, SPECS))
        raise TypeError(f"pack: expected a fuse_pass.PackSpec or one of {names}, got {spec!r}")
    return PackSpec(spec)


def _packed(module: nn.Module, spec: PackSpec | None) -> tuple[nn.Module, _Decline | None]:
    """The packed layer, or the module itself and why it stays; None where that goes without saying."""
    if isinstance(module, PackedModule):
        return module, (Reason.OVERLAP, "is packed already")
    if isinstance(module, QuantizedLayer):
        return _of_quantized_layer(module)
    kind = type(module)
    if kind not in (BitLinear, Int8Linear) and (spec is None or kind not in _OF_FLOAT):
        is_asked = spec is not None and _has_matrix(module)
        return module, _declined(f"{kind.__name__} has no packed layer") if is_asked else None
    problem = _problem_of_tensors(module)
    if problem:
        return module, _declined(problem)
    if isinstance(module, BitLinear):
        return _of_bit_linear(module), None
    if isinstance(module, Int8Linear):
        return _of_int8_linear(module), None
    made = _OF_FLOAT[kind](module, spec)
    return (module, _declined(made)) if isinstance(made, str) else (made, None)


def _declined(detail: str) -> _Decline:
    return Reason.NO_QUANTIZED_LAYER, detail


def _has_matrix(module: nn.Module) -> bool:
    weight = private.parameters_of(module).get("weight")
    return isinstance(module, tuple(_OF_FLOAT)) or (weight is not None and weight.dim() > 1)


def _of_embedding(module: nn.Embedding, spec: PackSpec) -> nn.Module | str:
    """Nothing is multiplied, so that only the weight can be in few bits."""
    if module.max_norm is not None:
        return "its table is written to in every call (max_norm)"
    chosen = PackSpec("int8_weight_only") if spec.name in (INT8, LLM_INT8) else spec
    if chosen.kind != WEIGHT_ONLY:
        return f"an Embedding has no packed layer of {spec.name}"
    return PackedEmbedding(module, chosen)


def _of_conv2d(module: nn.Conv2d, spec: PackSpec) -> nn.Module | str:
    if spec.kind == WEIGHT_ONLY:
        return PackedConv2d(module, spec)
    if spec.kind != INT8:
        return f"a Conv2d has no packed layer of {spec.name}"
    layer = QuantizedConv2d.from_float(module, INT8_SPEC)
    return problem_of_conv2d(layer) or PackedQuantizedConv2d(layer)


# What takes the place of a layer in floating point, by exact type; or why nothing does.
_OF_FLOAT: dict[type[nn.Module], Callable[[Any, Any], nn.Module | str]] = {
    nn.Linear: PackedLinear.from_float,
    nn.Embedding: _of_embedding,
    nn.Conv2d: _of_conv2d,
    nn.MultiheadAttention: PackedMultiheadAttention,
    nn.RNN: PackedRNN,
    nn.LSTM: PackedLSTM,
    nn.GRU: PackedGRU,
}


def _of_quantized_layer(module: QuantizedLayer) -> tuple[nn.Module, _Decline | None]:
    if type(module) not in (QuantizedLinear, QuantizedConv2d):
        return module, _declined(f"{type(module).__name__} has no packed layer")
    problem = _problem_of_tensors(module)
    if isinstance(module, QuantizedConv2d):
        problem = problem or problem_of_conv2d(module)
        return (module, _declined(problem)) if problem else (PackedQuantizedConv2d(module), None)
    assert isinstance(module, QuantizedLinear)
    problem = problem or problem_of_linear(module)
    return (module, _declined(problem)) if problem else (PackedQuantizedLinear(module), None)


def _problem_of_tensors(module: nn.Module) -> str:
    if "forward" in vars(module):
        return "its forward was replaced"
    if not _has_weights_of_its_own(module):
        return "its weight is computed (pruned)"
    has_hooks_inside = isinstance(module, nn.MultiheadAttention) and private.has_hooks(module.out_proj)
    return "its out_proj has hooks, which would be lost" if has_hooks_inside else ""


def _has_weights_of_its_own(module: nn.Module) -> bool:
    """Parameters, or what a layer that is packed or quantised already keeps instead."""
    names = {*private.parameters_of(module), *private.buffers_of(module)}
    if isinstance(module, BitLinear) and module.is_packed:
        return True
    if isinstance(module, nn.RNNBase):
        return names.issuperset(names_of_weights(module))
    if isinstance(module, nn.MultiheadAttention):
        needed = {"in_proj_weight"} if module.kdim == module.vdim == module.embed_dim else _PROJECTION_WEIGHTS
        return needed <= names and "weight" in private.parameters_of(module.out_proj)
    return "weight" in names


_PROJECTION_WEIGHTS = {"q_proj_weight", "k_proj_weight", "v_proj_weight"}


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
    is_packable = type(module) in (*_OF_FLOAT, BitLinear, Int8Linear, QuantizedLinear, QuantizedConv2d)
    return (Reason.EXCLUDED, "the caller left it out") if is_packable else None
