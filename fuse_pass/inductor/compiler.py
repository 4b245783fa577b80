"""What fuse_pass asks of Dynamo and Inductor, the same for torch 2.11 to 2.15; importing this loads both."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch._inductor.config as inductor_config
from torch._dynamo import eval_frame
from torch._dynamo.backends import registry
from torch._dynamo.exc import FailOnRecompileLimitHit as RecompileLimitHit
from torch._dynamo.repro.after_dynamo import WrapBackendDebug
from torch._dynamo.utils import counters, numpy_method_wrapper, numpy_operator_wrapper, numpy_to_tensor_wrapper
from torch._inductor import inductor_prims, list_mode_options
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.exc import InductorError
from torch._inductor.pattern_matcher import (
    CallFunction,
    Ignored,
    KeywordArg,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = [
    "EXACT_QUOTIENTS",
    "NUMPY_CALLS",
    "STORED_ONCE",
    "CallFunction",
    "CustomGraphPass",
    "Ignored",
    "InductorError",
    "KeywordArg",
    "Match",
    "PatternMatcherPass",
    "RecompileLimitHit",
    "call_context_of_backends",
    "draws_stock_random_numbers",
    "fail_at_recompile_limit",
    "forget_original",
    "frames_given_up",
    "graph_break",
    "inductor_compiler",
    "is_given",
    "is_inductor_option",
    "is_seed",
    "joint_passes",
    "list_mode_options",
    "never_compile_alone",
    "register_backend",
    "register_graph_pattern",
    "room_for_masks",
    "seeds_of",
    "stance",
    "statically_known_true",
]

# What Dynamo writes into its graphs where a model calls NumPy.
NUMPY_CALLS = (numpy_method_wrapper, numpy_operator_wrapper, numpy_to_tensor_wrapper)

# What `compat.stored_once` writes into graphs.
STORED_ONCE = inductor_prims.force_stride_order


def is_seed(node: Node) -> bool:
    """Whether Inductor has put this node in the place of a draw, its own ones included."""
    return node.target is inductor_prims.lookup_seed


def seeds_of(seed: Node) -> Node:
    """The draw of all seeds of a graph on one device, of which this is one."""
    seeds: Node = seed.args[0]  # type: ignore[assignment]
    return seeds


def is_inductor_option(name: str) -> bool:
    return name.replace("-", "_") in inductor_config.get_config_copy()


def is_given(name: str, options: Mapping[str, Any]) -> bool:
    """Whether the options of one compilation say anything about this one of Inductor's."""
    return name in _with_underscores(options)


def _with_underscores(options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor reads dashes in the name of an option as underscores."""
    return {key.replace("-", "_"): value for key, value in options.items()}


def _option(options: Mapping[str, Any], name: str) -> Any:
    """The value that will hold during compilation."""
    return _with_underscores(options).get(name, getattr(inductor_config, name, None))


def draws_stock_random_numbers(options: Mapping[str, Any]) -> bool:
    """Whether the user asked for eager's random numbers, which our own generator cannot give."""
    return any(_option(options, name) for name in ("fallback_random", "align_random_eager"))


def joint_passes(options: Mapping[str, Any]) -> tuple[Callable[[Graph], None], ...]:
    """The user's own passes on the joint graph: one, or from torch 2.13 on a list."""
    passes = _option(options, "joint_custom_post_pass")
    if not passes:
        return ()
    return tuple(passes) if isinstance(passes, (list, tuple)) else (passes,)


# How many operations Inductor computes anew for each reader, before torch 2.13 by an explicit setting.
_USUAL_OPERATIONS = 30


def room_for_masks(options: Mapping[str, Any]) -> dict[str, int]:
    """The setting with which Inductor keeps the operations of a dropout mask inside of the kernel that reads it.

    Its own limit is 30 operations in a value with several readers, and is passed in the middle of the hash. The rest of
    the hash would then be read from memory: an int32 for each element, written by a kernel of its own. Empty where the
    user has chosen a limit.
    """
    name = "realize_opcount_threshold"
    is_chosen = _option(options, name) not in (None, _USUAL_OPERATIONS)
    return {} if is_chosen else {name: 2 * _USUAL_OPERATIONS}


# Settings with which Triton divides as IEEE 754 says, as eager PyTorch does.
EXACT_QUOTIENTS: Mapping[str, bool] = MappingProxyType({"eager_numerics.division_rounding": True})


def inductor_compiler(mode: str | None, options: Mapping[str, Any] | None) -> Any:
    """Inductor as a callable (graph module, example inputs) → compiled function; its `.config` holds the patches."""
    return torch._TorchCompileInductorWrapper(mode, dict(options or {}), None)


# --- calls of compiled functions --------------------------------------------------------------------------------------


def register_backend(backend: Callable[..., Any], name: str) -> None:
    """Makes a backend one that Dynamo has in its own list, if it is not: for these it clears away more after compiling.

    Not to be called while the backend's file is imported: it may be because Dynamo looks the name up, and then does it.
    """
    if name not in registry._COMPILER_FNS:
        registry.register_backend(backend, name=name)


class _CallContext:
    """Gives what `torch.compile` wraps a backend in the attribute that Dynamo looks for, where the backend has one.

    A backend with an attribute `backend_ctx_ctor` has the context that it makes entered at every call of what it
    compiles, also when the call runs eagerly in the end. `torch.compile` hides the attribute behind its wrapper.
    """

    def __get__(self, wrapper: Any, owner: type | None = None) -> Any:
        if wrapper is None:
            return self
        inner = wrapper._torchdynamo_orig_backend
        make = getattr(getattr(inner, "compiler_fn", inner), "call_context", None)
        made = None if make is None else make(getattr(inner, "kwargs", {}).get("options"))
        if made is None:
            raise AttributeError("backend_ctx_ctor")
        return made


def call_context_of_backends() -> None:
    """Lets every backend have a method `call_context(options)`: what makes the context of a call, or None for none.

    The method is asked once, by `torch.compile`, with the `options=` that it was given or None.
    """
    WrapBackendDebug.backend_ctx_ctor = _CallContext()  # type: ignore[attr-defined]


def never_compile_alone(function: Any) -> None:
    """Keeps Dynamo from compiling a call of a function from eager code; inside of compiled code it is traced."""
    eval_frame.skip_code(function.__code__)


def forget_original(compiled: Any) -> None:
    """`torch.compile` and `torch.compiler.disable` of a compiled module then call it as it is, not what it compiles."""
    del compiled._torchdynamo_orig_callable


def stance() -> str | None:
    """What `torch.compiler.set_stance` has set other than to compile and run with the backend that was given."""
    now = eval_frame._stance
    if now.stance != "default":
        return now.stance
    return None if now.backend is None else f"force_backend={now.backend!r}"


def frames_given_up() -> int:
    """How many frames Dynamo has left to eager PyTorch in this process because it could not compile them."""
    frames = counters["frames"]
    return frames["total"] - frames["ok"]


def graph_break(gm: torch.fx.GraphModule) -> tuple[str, str, int] | None:
    """Why a graph of Dynamo ended before the function did, and the file and line of it; None where it did not."""
    ending = getattr(gm, "compile_subgraph_reason", None)
    if ending is None or not ending.graph_break:
        return None
    reason = str(ending.reason).strip().partition("\n")[0]
    frame = ending.user_stack[-1] if ending.user_stack else None
    return (reason, "", 0) if frame is None else (reason, frame.filename, frame.lineno or 0)


# The setting itself: a look at it by name takes 3 us, and this is asked at every call.
_limit_setting: Any = dynamo_config._config["fail_on_recompile_limit_hit"]  # type: ignore[attr-defined]
_limit_lock = threading.Lock()
_limit_before: list[Any] = []


def _fail_everywhere() -> Callable[[], None]:
    """For torch 2.11, whose settings all threads share: the first to ask sets it, the last to restore sets it back."""
    with _limit_lock:
        _limit_before.append(_limit_setting.user_override)
        _limit_setting.user_override = True
    return _restore_everywhere


def _restore_everywhere() -> None:
    with _limit_lock:
        before = _limit_before.pop()
        if not _limit_before:
            _limit_setting.user_override = before


def _fail_here() -> Callable[[], None]:
    setting = _limit_setting.user_override
    before = setting.get()
    setting.set(True)
    return functools.partial(setting.set, before)


def fail_at_recompile_limit() -> Callable[[], None]:
    """From now on Dynamo raises `RecompileLimitHit` where it would leave a function to eager PyTorch for good.

    Returns what sets it back. Written past the checks of the settings, which take longer than all the rest of a call.
    """
    return _fail_here() if isinstance(_limit_setting.user_override, ContextVar) else _fail_everywhere()
