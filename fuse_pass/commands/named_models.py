"""The models that a command is about: reference models by name, or any function of the user's."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fuse_pass.analysis import coverage
from fuse_pass.commands.errors import CommandError
from fuse_pass.report import Report

_MODES = ("train", "eval")
_EXPECTED = "expected a tuple (nn.Module, args) or (nn.Module, args, kwargs)"


@dataclass(frozen=True)
class Example:
    """A model with one call of it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def reports(names: list[str]) -> Iterator[tuple[str, str, Report]]:
    """Name, mode and coverage of every model in training and in evaluation."""
    for name in names or reference_models().NAMES:
        example = example_of(name) if ":" in name else _reference_example(name)
        for mode in _MODES:
            example.model.train(mode == "train")
            with torch.set_grad_enabled(mode == "train"):
                yield name, mode, coverage(example.model, *example.args, **example.kwargs)


def example_of(name: str) -> Example:
    """Calls `package.module:function` and checks what it returns.

    Raises:
        CommandError: no such function, or it does not return a model with its inputs.
    """
    result = _function(name)()
    if not (isinstance(result, tuple) and len(result) in (2, 3) and isinstance(result[0], nn.Module)):
        raise CommandError(f"{name}: {_EXPECTED}, got {_described(result)}")
    model, inputs, *rest = result
    kwargs = rest[0] if rest else {}
    if not (isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)):
        raise CommandError(f"{name}: {_EXPECTED}, got {_described(result)}; kwargs is a dict with names as keys")
    return Example(model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), dict(kwargs))


def _function(name: str) -> Callable[[], object]:
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise CommandError(f"expected package.module:function, got {name!r}; write for instance my_model:build")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise CommandError(f"cannot load {name!r}: {error}; modules are looked for here and on PYTHONPATH") from error
    if not callable(function):
        raise CommandError(f"{name}: expected a function, got {_described(function)}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise CommandError(
            f"{name}: expected a function without required arguments, got one for which: {error}; wrap it in one"
        ) from error
    return function  # type: ignore[no-any-return]


def _described(value: object) -> str:
    """The type of a value, and those inside a tuple."""
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__


def _reference_example(name: str) -> Example:
    try:
        reference = reference_models().load(name)
    except ValueError as error:
        raise CommandError(f"{error}; for a model of your own write package.module:function") from error
    return Example(reference.build(), reference.example_inputs())


def reference_models() -> Any:
    """The package `models` of the source tree.

    Raises:
        CommandError: it cannot be imported from here.
    """
    try:
        models = importlib.import_module("models")
        return models if hasattr(models, "NAMES") else _no_reference_models()
    except ModuleNotFoundError:
        return _no_reference_models()


def _no_reference_models() -> Any:
    raise CommandError(
        "the reference models are in the source tree of fuse_pass, not in the installed package: "
        "run this in a checkout, or name a model of your own as package.module:function"
    )
