"""Who takes part in a row of `bench`: eager PyTorch, `torch.compile` with several settings, and fuse_pass.

Each compiled contender has a function of its own code object, so that none of them pays for the guards of another or
finds its compiled code. Its first call starts from empty caches and is timed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fuse_pass.backend import FuseBackend, fuse_backend
from fuse_pass.bench.models import mlp
from fuse_pass.bench.results import EAGER, FREEZING, MAX_AUTOTUNE, OURS, STOCK
from fuse_pass.bench.rows import Row
from fuse_pass.commands.errors import CommandError
from fuse_pass.commands.named_models import Example
from fuse_pass.inductor.settings import constant_weights, fresh_caches
from fuse_pass.report import Report, collect


class Step:
    """Forward and backward of a model, or forward alone under `no_grad`.

    Args:
        call: the model, compiled or not.
        example: its parameters and inputs.
        row: mode and autocast.
    """

    def __init__(self, call: Callable[..., Any], example: Example, row: Row) -> None:
        self.call, self.example, self.row = call, example, row
        inputs = tensors_of((example.args, example.kwargs))
        self.leaves = [tensor for tensor in (*inputs, *example.model.parameters()) if tensor.requires_grad]
        self.device_type = next((tensor.device.type for tensor in (*inputs, *example.model.parameters())), "cpu")
        self.cotangents: list[Tensor] | None = None

    def __call__(self) -> None:
        if not self.row.train:
            self.forward()
            return
        for leaf in self.leaves:
            leaf.grad = None
        outputs = [tensor for tensor in tensors_of(self.forward()) if tensor.requires_grad]
        if not outputs:
            raise CommandError(f"{self.row.name}: expected an output that depends on a parameter, got none to train")
        if self.cotangents is None:
            self.cotangents = [torch.ones_like(output) for output in outputs]
        torch.autograd.backward(outputs, self.cotangents)

    def forward(self) -> Any:
        cast = contextlib.nullcontext() if self.row.autocast is None else self._autocast()
        with torch.set_grad_enabled(self.row.train), cast:
            return self.call(*self.example.args, **self.example.kwargs)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, self.row.autocast)

    def saved_bytes(self) -> int:
        """Bytes of the tensors that autograd keeps from forward to backward, parameters not counted."""
        kept: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in self.example.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = self.forward()  # held until the hooks are done, or an address could be counted for two tensors
        del outputs
        return sum(kept.values())


@dataclass(frozen=True)
class Contenders:
    """The steps by contender, and what compiling them said.

    Attributes:
        steps: one call each.
        first_call_seconds: of the compiled ones, from empty caches, with one step.
        report: what fuse_pass found.
    """

    steps: dict[str, Step]
    first_call_seconds: dict[str, float] = field(default_factory=dict)
    report: Report = field(default_factory=Report)


def contenders(row: Row, device: str, progress: Callable[[str], None]) -> Contenders:
    """Builds the row's model and compiles every contender; progress gets a word for each.

    A setting that cannot compile the model is left out, with a word; eager, torch.compile as it is and fuse_pass must.
    """
    built = row.build()
    example = Example(built.model.to(device), placed(built.args, device), placed(built.kwargs, device))
    eager = _copy(example, row)
    result = Contenders({EAGER: Step(eager.model, eager, row)})
    for name, settings in _settings(row).items():
        own = _copy(example, row)
        step = Step(torch.compile(own_function(own.model), **settings), own, row)
        try:
            result.first_call_seconds[name] = _first_call(name, step, result.report)
        except Exception as error:
            if name not in (FREEZING, MAX_AUTOTUNE):
                raise
            progress(f"{name} failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
            continue
        progress(f"{name} {result.first_call_seconds[name]:.1f} s")
        result.steps[name] = step
    return result


def _first_call(name: str, step: Step, report: Report) -> float:
    with _surroundings(name, report):
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


def _settings(row: Row) -> dict[str, dict[str, Any]]:
    """Arguments of `torch.compile` by contender. Only with freezing are there several CPU kernels to tune."""
    settings: dict[str, dict[str, Any]] = {STOCK: {}}
    if not row.train:
        settings[FREEZING] = {}
        if row.autotune:
            settings[MAX_AUTOTUNE] = {"mode": "max-autotune-no-cudagraphs"}
    return settings | {OURS: {"backend": FuseBackend(prepack=row.prepack)}}


@contextlib.contextmanager
def _surroundings(name: str, report: Report) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(fresh_caches())
        if name in (FREEZING, MAX_AUTOTUNE):
            stack.enter_context(constant_weights())
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # a page for every product that is tuned
        collected = stack.enter_context(collect())
        yield
        report.extend(collected)


def _copy(example: Example, row: Row) -> Example:
    """The same call of a copy of the model, in the row's mode."""
    try:
        model = copy.deepcopy(example.model)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise CommandError(
            f"{row.name}: expected a model that copy.deepcopy can copy, got {type(example.model).__name__} ({error}); "
            "each contender needs its own"
        ) from error
    return Example(model.train(row.train), example.args, example.kwargs)


def own_function(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls the model, of its own code object: Dynamo keeps compiled code per code object."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)


def warm_up(device: str) -> None:
    """Compiles something small both ways: the first time in a process costs seconds that belong to no row."""
    x = torch.randn(64, 256, device=device, requires_grad=True)
    for backend in ("inductor", fuse_backend):
        model = nn.Sequential(mlp(256, 1024), nn.Dropout(0.1), nn.LayerNorm(256)).to(device)
        compiled: Callable[[Tensor], Tensor] = torch.compile(own_function(model), backend=backend)
        with fresh_caches() if backend == "inductor" else contextlib.nullcontext():
            compiled(x).sum().backward()


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_of(part)] if isinstance(value, (tuple, list)) else []


def placed(value: Any, device: str) -> Any:
    """The same value with its tensors on a device; those that need a gradient are leaves again."""
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)([placed(part, device) for part in value])
    if isinstance(value, dict):
        return {key: placed(part, device) for key, part in value.items()}
    return value
