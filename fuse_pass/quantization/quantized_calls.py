"""A model that was asked to be quantised never computes in float unnoticed: every call of it is watched.

Dynamo may leave code to eager PyTorch: past its recompile limit, under a stance such as "force_eager", behind
`torch.compiler.disable`, and in functions that it cannot compile. Of a quantised model that would be another model.

    what runs eagerly                                found by                          both entry points
    the whole call                                   no graph of ours ran in it        yes: RuntimeError
    a function past the recompile limit              Dynamo fails there                yes: RuntimeError
    a layer with weights of `fuse_pass.compile`      hooks on the layer                no:  RuntimeError
    anything else after a graph break                Dynamo's reason for the break     yes: RuntimeWarning
    anything else in a function that was given up    Dynamo's counters                 yes: RuntimeWarning

A call in which nothing is computed runs no graph either, and is an error too.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.fx import GraphModule

from fuse_pass.inductor import compiler
from fuse_pass.numerics.spec import QuantSpec

# Stances under which Dynamo runs every function eagerly once, those that a compiled one calls included.
_EAGER_AT_FIRST = ("eager_then_compile", "aot_eager_then_compile")


class _Thread(threading.local):
    """What one thread is in."""

    call: QuantizedCall | None = None


_thread = _Thread()


class QuantizedCall:
    """One call of a function that is compiled with `quantize=`, as a context.

    Raises:
        RuntimeError: at the end, if the call itself raised nothing and ran no graph of this spec, or if a function
            in it has reached Dynamo's recompile limit.
    """

    __slots__ = ("_given_up", "_handled", "_outer", "_restore", "graphs", "graphs_before", "has_break", "spec")

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec
        self.graphs = 0
        self.has_break = False  # whether one of the graphs ended before its function did
        self.graphs_before: dict[int, int] = {}  # where each layer that runs eagerly now has begun

    def __enter__(self) -> Self:
        self._outer, _thread.call = _thread.call, self
        self._handled = _exception()
        self._given_up = compiler.frames_given_up()
        self._restore = compiler.fail_at_recompile_limit()
        return self

    def __exit__(self, *_: Any) -> None:  # Dynamo tells nothing of an exception
        _thread.call = self._outer
        self._restore()
        if self._outer is not None and self._outer.spec == self.spec:
            self._outer.graphs += self.graphs
            self._outer.has_break |= self.has_break
        error, traceback = _exception()
        (handled, its_traceback), self._handled = self._handled, (None, None)
        if error is not handled or traceback is not its_traceback:
            if isinstance(error, compiler.RecompileLimitHit):
                raise RuntimeError(_past_the_limit(self.spec)) from error
            return
        stance = compiler.stance()
        if not self.graphs or stance in _EAGER_AT_FIRST:
            raise RuntimeError(_all_eager(self.spec))
        if stance is not None and self.has_break:
            warnings.warn(
                f"fuse_pass: quantize={self.spec}: under the stance {stance}, what comes after a graph break runs "
                "eagerly, unquantised, where it was not compiled before",
                RuntimeWarning,
                stacklevel=3,
            )
        if compiler.frames_given_up() > self._given_up:
            warnings.warn(
                f"fuse_pass: quantize={self.spec}: Dynamo could not compile a function of this model and leaves it to "
                "eager PyTorch; its own operations are not quantised, only what it calls. "
                "TORCH_LOGS=graph_breaks tells which, and fullgraph=True makes it an error",
                RuntimeWarning,
                stacklevel=3,
            )


def _exception() -> tuple[BaseException | None, Any]:
    """The exception that is handled or on its way now; one that is raised once more has another traceback."""
    error = sys.exc_info()[1]
    return error, None if error is None else error.__traceback__


def _all_eager(spec: QuantSpec) -> str:
    return (
        f"quantize={spec}: expected this call to run a quantised graph, got none or not for all of it, so that what it "
        f"has computed is unquantised. {_cause()}"
    )


def _cause() -> str:
    """Why code of a quantised call has run eagerly, and what to do."""
    stance = compiler.stance()
    if stance is not None:
        return f"The stance is {stance}. Call it under the stance 'default', once for every kind of input."
    return (
        "Dynamo has left it to eager PyTorch: it lies behind torch.compiler.disable or in a function that cannot be "
        "compiled (TORCH_LOGS=graph_breaks tells why, and fullgraph=True finds it), or a precompile cache held code of "
        "another backend. Mend that, or use fuse_pass.convert, which quantises without compiling."
    )


def _past_the_limit(spec: QuantSpec) -> str:
    return (
        f"quantize={spec}: a function has reached Dynamo's recompile limit, and would run unquantised from now on. "
        "Compile with dynamic=True if sizes differ, or raise torch._dynamo.config.recompile_limit and "
        "accumulated_recompile_limit; TORCH_LOGS=recompiles tells why it was compiled so often."
    )


def counted(compiled: Callable[..., Any], *, has_break: bool = False) -> Callable[..., Any]:
    """A compiled graph that tells the call that it runs in, also whether it ends before its function does."""

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        call = _thread.call
        if call is not None:
            call.graphs += 1
            call.has_break |= has_break
        return compiled(*args)

    return run


# --- layers -----------------------------------------------------------------------------------------------------------

_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def watch_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...], name: str = "") -> None:
    """Puts hooks on the layers of a model that raise where one runs eagerly within a quantised call.

    A layer is a module of one of the `kinds` that has parameters, or any other with a parameter of its own of two or
    more dimensions. Ours quantise by themselves. Compiled code pays nothing: the hooks do nothing there.
    """
    if type(model).__module__.partition(".")[0] == __package__:
        return
    if model not in _names and _has_weights(model, kinds):
        model.register_forward_pre_hook(_before_layer)
        model.register_forward_hook(_after_layer)
        _names[model] = name
    for child_name, child in model.named_children():
        watch_layers(child, kinds, f"{name}.{child_name}" if name else child_name)


def _has_weights(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    if isinstance(module, kinds):
        return next(module.parameters(), None) is not None
    own = (parameter for parameter in module.parameters(recurse=False))
    return any(not nn.parameter.is_lazy(parameter) and parameter.dim() > 1 for parameter in own)


def _before_layer(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling() and _thread.call is not None:
        _thread.call.graphs_before[id(module)] = _thread.call.graphs


def _after_layer(module: nn.Module, args: Any, output: Any) -> None:
    """A module whose `forward` Dynamo has compiled for itself has run a graph of ours."""
    call = None if torch.compiler.is_compiling() else _thread.call
    if call is not None and call.graphs_before.pop(id(module), -1) == call.graphs:
        raise RuntimeError(
            f"quantize={call.spec}: expected every layer to run in a quantised graph, but "
            f"{_names.get(module) or 'a layer'} ({type(module).__name__}) ran eagerly, unquantised. {_cause()}"
        )


compiler.never_compile_alone(_before_layer)
compiler.never_compile_alone(_after_layer)


# --- graph breaks -----------------------------------------------------------------------------------------------------

_told: dict[str, dict[Any, Any]] = {}


def warn_of_graph_break(gm: GraphModule, spec: QuantSpec) -> tuple[str, str, int] | None:
    """Tells once per place that a quantised graph ends before the function does; returns why, the file and the line."""
    found = compiler.graph_break(gm)
    if found is not None:
        reason, file, line = found
        warnings.warn_explicit(
            f"fuse_pass: quantize={spec}: a quantised graph ends here ({reason}); what eager PyTorch computes before "
            "the next one begins is not quantised",
            RuntimeWarning,
            filename=file or "<unknown>",
            lineno=line,
            registry=_told.setdefault(file, {}),
        )
    return found
