"""Compiling a model in place: its `forward` is compiled, and all else about it stays as it is.

`model(x)` and `model.forward(x)` run the same compiled code, hooks on the model itself run around it. As an attribute
of the instance, the compiled `forward` would be that of the first model in every copy; so it says how it is copied.
"""

from __future__ import annotations

import copy
import inspect
import operator
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fuse_pass.backend import FuseBackend
from fuse_pass.calling import has_fast_path, is_opaque, kept_whole, quantize_opaque_layers, without_fast_path
from fuse_pass.inductor import private
from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.options import Options
from fuse_pass.quantization.layers import LAYER_FOR
from fuse_pass.quantization.quantized_calls import watch_layers

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Settings:
    """How a model is compiled.

    Attributes:
        options: of the backend.
        torch_compile: what else `torch.compile` is given.
        spec: what the graphs are quantised to; None for not at all.
        has_fast_path: whether the model has layers whose fast path must be off.
    """

    options: Options
    torch_compile: Mapping[str, Any]
    spec: QuantSpec | None
    has_fast_path: bool

    def compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The function compiled; itself where compiling is switched off."""
        compiled: Callable[..., Any] = torch.compile(
            forward, backend=FuseBackend.of(self.options), **self.torch_compile
        )
        if compiled is forward:
            return forward
        compiled = without_fast_path(compiled) if self.has_fast_path else compiled
        return compiled if self.spec is None else kept_whole(compiled)


class CompiledForward:
    """What is in the place of a model's `forward`.

    A deep copy of the model has one of its own, compiled in the same way. A pickled model has the original `forward`
    again; of a quantised one that would be another model, and it raises.
    """

    def __init__(self, model: nn.Module, original: Callable[..., Any], settings: Settings) -> None:
        self.model, self.original, self.settings = model, original, settings
        self.compiled = settings.compiled(original)
        self.__name__ = "forward"
        self.__doc__ = original.__doc__
        self.__signature__ = inspect.signature(original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)

    @property
    def __code__(self) -> types.CodeType:
        """Of the original: `torch.export` names inputs after it."""
        code: types.CodeType = self.original.__code__
        return code

    def __repr__(self) -> str:
        return f"<{type(self.model).__name__}.forward, compiled in place by fuse_pass>"

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        model = copy.deepcopy(self.model, memo)  # the one that this is to be a part of
        if isinstance(self.original, types.MethodType) and self.original.__self__ is self.model:
            return CompiledForward(model, types.MethodType(self.original.__func__, model), self.settings)
        return CompiledForward(model, copy.deepcopy(self.original, memo), self.settings)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """As the original, by names that every process knows."""
        if self.settings.spec is not None:
            raise TypeError(
                f"cannot pickle a model that fuse_pass has compiled in place with quantize={self.settings.spec}: what "
                "is read back would compute in floating point. Save model.state_dict(), load it into a new model and "
                "compile that; or use fuse_pass.convert, whose models can be pickled"
            )
        if getattr(self.original, "__func__", None) is type(self.model).forward:
            return getattr, (self.model, "forward")
        return operator.getitem, ([self.original], 0)


def compile_in_place(
    model: ModuleT, options: Options, spec: QuantSpec | None, torch_compile: Mapping[str, Any]
) -> ModuleT:
    """Compiles `model.forward`; see `fuse_pass.compile`."""
    if not isinstance(model, nn.Module) or private.uncompiled(model) is not model:
        raise TypeError(
            f"inplace=True: expected a torch.nn.Module that torch.compile has not wrapped, got {model!r}; "
            "without inplace=True functions can be compiled, too"
        )
    before = vars(model).get("forward")
    _require_same_format(before, spec)
    original = before.original if isinstance(before, CompiledForward) else model.forward
    settings = Settings(options, dict(torch_compile), spec, has_fast_path(model))
    if settings.compiled(original) is original:
        if spec is not None:
            raise RuntimeError(switched_off(spec))
        return model
    if spec is not None:
        if is_opaque(model):
            raise ValueError(
                f"quantize={spec}: {type(model).__name__} itself is one call in a graph and would have to become "
                "another class; compile it without inplace=True, or use fuse_pass.convert"
            )
        quantize_opaque_layers(model, spec)
        watch_layers(model, tuple(LAYER_FOR))
    vars(model)["forward"] = CompiledForward(model, original, settings)
    return model


def _require_same_format(before: Any, spec: QuantSpec | None) -> None:
    """What was converted stays so: with another format one model would compute in two."""
    first = before.settings.spec if isinstance(before, CompiledForward) else None
    if first is not None and first != spec:
        raise ValueError(
            f"expected the same format as before, got quantize={spec}: the model is compiled in place with "
            f"quantize={first}, which cannot be undone; compile a new model"
        )


def switched_off(spec: QuantSpec) -> str:
    """What to say where a model that should be quantised would not be compiled."""
    return (
        f"quantize={spec}: expected torch.compile to compile, but it is switched off (disable=True or "
        "TORCHDYNAMO_DISABLE=1) and would give the unquantised model; fuse_pass.convert quantises without compiling"
    )
