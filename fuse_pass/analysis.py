"""`fuse_pass.coverage`: what would be fused in a model and what would not, without building any kernel."""

from __future__ import annotations

import contextlib
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fuse_pass.backend import FuseBackend
from fuse_pass.inductor import private
from fuse_pass.report import Report, noting_what_is_left_out


def coverage(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Traces `model(*args, **kwargs)` once, applies every pattern to the graphs and reports what they found.

    The model runs eagerly, once, in the mode (train or eval, grad or no_grad, autocast) in which it would be called.
    Afterwards train/eval flags, buffers and the random states of PyTorch and Python are as they were. A model that
    breaks into several graphs gives one merged report.

    Args:
        model: a module or function; one that `torch.compile` has wrapped is looked at as if it were not.
        *args: its positional arguments.
        **kwargs: its keyword arguments.
    """
    model = private.uncompiled(model)
    report = Report()

    def look(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        report.extend(FuseBackend(strict=True).rewrite(gm)[1])
        return gm.forward

    with _restored(model), noting_what_is_left_out(report):
        torch.compile(_call_of(model), backend=look)(*args, **kwargs)
    return report


def _call_of(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own code object, so that the caller's compiled code keeps its place in Dynamo's cache."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return types.FunctionType(
        call.__code__.replace(), call.__globals__, call.__name__, call.__defaults__, call.__closure__
    )


@contextlib.contextmanager
def _restored(model: Callable[..., Any]) -> Iterator[None]:
    """Puts back the train/eval flags, the buffers and the random states that a forward pass may change."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [(module, module.training) for module in modules]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in modules
        for name, buffer in private.buffers_of(module).items()
    ]
    python_state = random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        for module, flag in training:
            module.training = flag
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
                private.buffers_of(module)[name] = buffer
