"""What surrounds every call of what is compiled: the fast path of encoders, and quantised graphs that stay whole."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fuse_pass.numerics.formats import Format
from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.quantization.convert import convert

# Their arithmetic is out of a graph's reach.
_OPAQUE = (nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN)
# Their fast path in eval is one opaque call, in which no pattern can be seen.
_WITH_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def has_fast_path(model: object) -> bool:
    return isinstance(model, nn.Module) and any(isinstance(module, _WITH_FAST_PATH) for module in model.modules())


def without_fast_path(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which runs with the fast path switched off."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    return run


def kept_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """What another `torch.compile` calls and does not look into: in its graph nothing would be quantised."""

    @functools.wraps(function, updated=())  # without the notes by which Dynamo finds the function inside
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "quantize= of fuse_pass: export would write the unquantised model; use fuse_pass.convert, or "
                "fuse_pass.fuse(…, quantize=…) of the model before it is compiled"
            )
        return function(*args, **kwargs)

    return torch.compiler.disable(run, reason="quantize= of fuse_pass needs a graph of its own")  # type: ignore[no-any-return]


def is_opaque(model: nn.Module) -> bool:
    """Whether the model itself is one call in a graph."""
    return type(model) in _OPAQUE


def quantize_opaque_layers(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """The model, whose layers that are one call in a graph are converted."""
    kinds: dict[str | type[nn.Module], QuantSpec | Format | str | None]
    kinds = {kind: spec for kind in _OPAQUE if any(type(module) is kind for module in model.modules())}
    return convert(model, kinds, inplace=True) if kinds else model


def with_opaque_layers_quantized(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """The same in a copy that shares parameters and buffers; the model itself where there is no such layer."""
    if not any(is_opaque(module) for module in model.modules()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return quantize_opaque_layers(copy.deepcopy(model, shared), spec)
