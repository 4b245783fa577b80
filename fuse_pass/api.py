"""`fuse_pass.compile`: `torch.compile` with our backend, and with what must be set before a model is traced."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fuse_pass.backend import FuseBackend, split_options
from fuse_pass.inductor import compiler
from fuse_pass.numerics.formats import Format
from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.options import Options
from fuse_pass.quantization.convert import convert
from fuse_pass.quantization.layers import LAYER_FOR
from fuse_pass.quantization.quantized_calls import watch_layers

# Their arithmetic is out of a graph's reach.
_OPAQUE = (nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN)
# Their fast path in eval is one opaque call, in which no pattern can be seen.
_WITH_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def compile(
    model: Callable[..., Any] | None = None,
    *,
    patterns: Iterable[str] | None = None,
    quantize: QuantSpec | Format | str | None = None,
    memory: str = "balanced",
    prepack: bool = False,
    strict: bool = False,
    **torch_compile_kwargs: Any,
) -> Any:
    """`torch.compile(model, backend=FuseBackend(patterns, …), **torch_compile_kwargs)`, set up for fusion.

    Options are checked at once, and not at the first call. For models with `nn.TransformerEncoder` or
    `nn.MultiheadAttention`, PyTorch's fast path for these layers is switched off while the compiled model runs, and
    only then: it would hide both patterns in one opaque call.

    Args:
        model: module or function; None to use `compile` as a decorator.
        patterns: names of the patterns to apply; None for all.
        quantize: a format, its name or a `QuantSpec`: inserts the fake quantisation that `fuse_pass.convert` would,
            where `FuseBackend` says.
            Layers that are one call in a graph (`nn.MultiheadAttention`, `nn.LSTM`, `nn.GRU`, `nn.RNN`) are swapped
            for Quantized* layers in a copy of the model that shares its parameters and buffers; call `train()` and
            `eval()` on what is returned. A call that would compute in floating point raises RuntimeError (see
            `FuseBackend`), also where one layer with weights runs eagerly: hooks on the layers find that, which do
            nothing in compiled code or when the model itself is called. What is returned is not looked into by an
            outer `torch.compile`, whose graph breaks there, nor by `torch.export`, which raises.
        memory: "fastest", "balanced" or "smallest": what is kept for backward; see `FuseBackend`.
        prepack: keep large weights a second time, in the order that a CPU multiplies fastest; see `FuseBackend`.
        strict: raise where a pass fails, instead of warning and compiling the untouched graph.
        **torch_compile_kwargs: `fullgraph`, `dynamic`, `mode`, `options` and `disable` of `torch.compile`.

    Raises:
        ValueError: an unknown pattern name, option, `mode` or setting of `memory`; both `mode` and `options`.
        TypeError: `backend` is given, an argument that `torch.compile` does not know, or one of a wrong type.
        RuntimeError: `quantize` where compilation is switched off (`disable=True`, TORCHDYNAMO_DISABLE=1).
    """
    if "backend" in torch_compile_kwargs:
        raise TypeError(
            "fuse_pass.compile always uses the fuse_pass backend and takes no `backend`; "
            "for another one call torch.compile"
        )
    chosen = Options.of(patterns, quantize, memory=memory, prepack=prepack, strict=strict)
    _require_valid(torch_compile_kwargs)
    if model is None:
        return functools.partial(compile, **chosen.as_dict(), **torch_compile_kwargs)
    own, _ = split_options(torch_compile_kwargs.get("options") or {})
    spec = chosen.updated(own).quantize
    if spec is not None and isinstance(model, nn.Module):
        model = with_opaque_layers_quantized(model, spec)
    compiled: Any = torch.compile(model, backend=FuseBackend.of(chosen), **torch_compile_kwargs)
    if isinstance(model, nn.Module) and any(isinstance(module, _WITH_FAST_PATH) for module in model.modules()):
        compiled.forward = without_fast_path(compiled.forward)
    if spec is None:
        return compiled
    if compiled is model:
        raise RuntimeError(
            f"quantize={spec}: expected torch.compile to compile, but it is switched off (disable=True or "
            "TORCHDYNAMO_DISABLE=1) and would give the unquantised model; fuse_pass.convert quantises without compiling"
        )
    if not isinstance(model, nn.Module):
        return _kept_whole(compiled)
    watch_layers(model, tuple(LAYER_FOR))
    compiler.forget_original(compiled)
    compiled.forward = _kept_whole(compiled.forward)
    return compiled


def _kept_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """What another `torch.compile` calls and does not look into: in its graph nothing would be quantised."""

    @functools.wraps(function, updated=())  # without the notes by which Dynamo finds the function inside
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "quantize= of fuse_pass: export would write the unquantised model; use fuse_pass.convert"
            )
        return function(*args, **kwargs)

    return torch.compiler.disable(run, reason="quantize= of fuse_pass needs a graph of its own")  # type: ignore[no-any-return]


def _require_valid(torch_compile_kwargs: dict[str, Any]) -> None:
    """What `torch.compile` would find out later: for a decorator where it is applied, for options at the first call."""
    inspect.signature(torch.compile).bind_partial(**torch_compile_kwargs)
    mode, options = (torch_compile_kwargs.get(name) for name in ("mode", "options"))
    if mode is not None and options is not None:
        raise ValueError(f"expected mode or options, got both: mode={mode!r}, options={options!r}")
    if options is not None:
        split_options(options)
    modes = ("default", *compiler.list_mode_options())
    if mode is not None and mode not in modes:
        raise ValueError(f"unknown mode {mode!r}; valid are {', '.join(modes)}")


def with_opaque_layers_quantized(model: nn.Module, spec: QuantSpec) -> nn.Module:
    opaque: dict[str | type[nn.Module], QuantSpec | Format | str | None]
    opaque = {kind: spec for kind in _OPAQUE if any(type(module) is kind for module in model.modules())}
    if not opaque:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return convert(copy.deepcopy(model, shared), opaque, inplace=True)


def without_fast_path(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return forward(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    return run
