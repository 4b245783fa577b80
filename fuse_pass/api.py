"""`fuse_pass.compile`: `torch.compile` with our backend, and with what must be set before a model is traced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import nn

from fuse_pass.backend import FuseBackend, split_options
from fuse_pass.calling import has_fast_path, kept_whole, with_opaque_layers_quantized, without_fast_path
from fuse_pass.in_place import compile_in_place, switched_off
from fuse_pass.inductor import compiler
from fuse_pass.numerics.formats import Format
from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.options import Options
from fuse_pass.quantization.layers import LAYER_FOR
from fuse_pass.quantization.quantized_calls import watch_layers

ModuleT = TypeVar("ModuleT", bound=nn.Module)
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")


@overload
def compile(
    model: None = None,
    *,
    patterns: Iterable[str] | None = ...,
    quantize: QuantSpec | Format | str | None = ...,
    memory: str = ...,
    prepack: bool = ...,
    strict: bool = ...,
    inplace: bool = ...,
    **torch_compile_kwargs: Any,
) -> Callable[[FunctionT], FunctionT]: ...


@overload
def compile(
    model: ModuleT,
    *,
    patterns: Iterable[str] | None = ...,
    quantize: QuantSpec | Format | str | None = ...,
    memory: str = ...,
    prepack: bool = ...,
    strict: bool = ...,
    inplace: bool = ...,
    **torch_compile_kwargs: Any,
) -> ModuleT: ...


@overload
def compile(
    model: Callable[P, R],
    *,
    patterns: Iterable[str] | None = ...,
    quantize: QuantSpec | Format | str | None = ...,
    memory: str = ...,
    prepack: bool = ...,
    strict: bool = ...,
    inplace: bool = ...,
    **torch_compile_kwargs: Any,
) -> Callable[P, R]: ...


def compile(
    model: Callable[..., Any] | None = None,
    *,
    patterns: Iterable[str] | None = None,
    quantize: QuantSpec | Format | str | None = None,
    memory: str = "balanced",
    prepack: bool = False,
    strict: bool = False,
    inplace: bool = False,
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
        inplace: compile the `forward` of `model` itself and return it, which stays what it is: its class, signature,
            `state_dict` and methods. `model(…)` and `model.forward(…)` are compiled, other methods are not. With
            `quantize`, layers that are one call in a graph are converted in the model itself. Compiled again, it has
            the settings of the last call, but for `quantize`, which cannot be changed. A deep copy is compiled as well;
            what is read from a pickle is not, and with `quantize` pickling raises.
        **torch_compile_kwargs: `fullgraph`, `dynamic`, `mode`, `options` and `disable` of `torch.compile`.

    Raises:
        ValueError: an unknown pattern name, option, `mode` or setting of `memory`; both `mode` and `options`.
        TypeError: `backend` is given, an argument that `torch.compile` does not know, or one of a wrong type;
            `inplace` for what is no module.
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
        return functools.partial(compile, **chosen.as_dict(), inplace=inplace, **torch_compile_kwargs)
    own, _ = split_options(torch_compile_kwargs.get("options") or {})
    spec = chosen.updated(own).quantize
    if inplace:
        return compile_in_place(model, chosen, spec, torch_compile_kwargs)  # type: ignore[type-var]
    if spec is not None and isinstance(model, nn.Module):
        model = with_opaque_layers_quantized(model, spec)
    compiled: Any = torch.compile(model, backend=FuseBackend.of(chosen), **torch_compile_kwargs)
    if has_fast_path(model):
        compiled.forward = without_fast_path(compiled.forward)
    if spec is None:
        return compiled
    if compiled is model:
        raise RuntimeError(switched_off(spec))
    if not isinstance(model, nn.Module):
        return kept_whole(compiled)
    watch_layers(model, tuple(LAYER_FOR))
    compiler.forget_original(compiled)
    compiled.forward = kept_whole(compiled.forward)
    return compiled


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
