"""The models that a command is about: reference models by name, or any function of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fuse_pass.analysis import coverage
from fuse_pass.commands.errors import CommandError
from fuse_pass.report import Report

TARGETS = "reference models by name, or package.module:function returning (model, inputs); all reference models if none"
_MODES = ("train", "eval")


def reports(names: list[str]) -> Iterator[tuple[str, str, Report]]:
    """Name, mode and coverage of every model in training and in evaluation."""
    for name in names or _reference_models().NAMES:
        model, inputs = _model_and_inputs(name)
        for mode in _MODES:
            model.train(mode == "train")
            with torch.set_grad_enabled(mode == "train"):
                yield name, mode, coverage(model, *inputs)


def _model_and_inputs(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    if ":" not in name:
        try:
            reference = _reference_models().load(name)
        except ValueError as error:
            raise CommandError(f"{error}; for a model of your own write package.module:function") from error
        return reference.build(), reference.example_inputs()
    module_name, function_name = name.split(":", 1)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise CommandError(f"cannot load {name!r}: {error}") from error
    result = function()
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise CommandError(f"{name}: expected a tuple (nn.Module, inputs), got {type(result).__name__}")
    model, inputs = result
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _reference_models() -> Any:
    try:
        models = importlib.import_module("models")
        return models if hasattr(models, "NAMES") else _no_reference_models()
    except ModuleNotFoundError:
        return _no_reference_models()


def _no_reference_models() -> Any:
    raise CommandError(
        "the reference models are in the source tree of fuse_pass: run this in a checkout, "
        "or name a model of your own as package.module:function"
    )
