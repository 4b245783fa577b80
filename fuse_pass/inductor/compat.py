"""What fuse_pass asks of Inductor and of PyTorch's build, the same for torch 2.11 to 2.15."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch._dynamo import eval_frame
from torch._dynamo.backends import registry
from torch._dynamo.exc import FailOnRecompileLimitHit as RecompileLimitHit
from torch._dynamo.repro.after_dynamo import WrapBackendDebug
from torch._dynamo.utils import counters
from torch._functorch.compile_utils import rand_ops
from torch._inductor import decomposition
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.fx import Graph, GraphModule, Node, traceback
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_mode, get_proxy_slot
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy

__all__ = [
    "EXACT_QUOTIENTS",
    "LEAST_BUDGET",
    "STORED_ONCE",
    "RecompileLimitHit",
    "cache_dir",
    "call_context_of_backends",
    "disable_current_modes",
    "draws_stock_random_numbers",
    "fail_at_recompile_limit",
    "forget_original",
    "frames_given_up",
    "give_room_for_seeds",
    "graph_break",
    "has_fast_cpu_dtype",
    "has_vector_loops",
    "inductor_compiler",
    "inductor_seed",
    "int_mm",
    "is_compiling",
    "is_given",
    "is_inductor_option",
    "is_known_backend",
    "is_seed",
    "joint_passes",
    "keep_for_backward",
    "memory_budget",
    "never_compile_alone",
    "never_merge",
    "never_recomputed",
    "onednn_linear",
    "onednn_linear_add",
    "onednn_version",
    "pack_onednn_weight",
    "register_decomposition",
    "room_for_masks",
    "rounds_quotients",
    "seeds_of",
    "size_hint",
    "stance",
    "stored_once",
    "vector_instructions",
]


STORED_ONCE = torch.ops.prims.inductor_force_stride_order.default


def register_decomposition(op: torch._ops.OpOverload, body: Callable[..., Any]) -> None:
    """Makes `op` transparent to Inductor: it sees the aten calls of `body` instead of an opaque call."""
    decomposition.register_decomposition([op])(body)
    # The merged table is cached at the first compilation; without this the op stays opaque ever after.
    decomposition.fast_random_decomps.cache_clear()


def inductor_seed(device: torch.device) -> torch.Tensor:
    """A fresh 63-bit seed (0-d int64) that follows `torch.manual_seed`; Inductor draws all seeds of a graph at once."""
    seed: torch.Tensor = torch.ops.prims.inductor_seed(device)
    return seed


def stored_once(x: torch.Tensor) -> torch.Tensor:
    """`x` itself; Inductor computes it in one kernel, and all who read it load it instead of computing it again.

    If x is an input of the graph, or becomes one by simplification, the result is that input, and AOTAutograd does not
    know it: kept for backward, it would be taken as memory to write to. So either x is computed for certain, or the
    result must be recomputed in backward (`joint.recompute`).
    """
    stored: torch.Tensor = STORED_ONCE(x, x.stride())
    return stored


def never_merge(*ops: torch._ops.OpOverloadPacket) -> None:
    """Tells AOTAutograd that two calls of these ops are two draws, and no common subexpression."""
    rand_ops.extend(op for op in ops if op not in rand_ops)


# How many operations Inductor computes anew for each reader, before torch 2.13 by an explicit setting.
_USUAL_OPERATIONS = 30
# The partitioner takes a budget of 0 as "keep the inputs of the graph and nothing else", and asks for no tags.
LEAST_BUDGET = 1e-9
# `torch.autograd.graph.region_activation_memory_budget` notes here what overrides the setting; new in torch 2.13.
_REGION_BUDGET: str | None = getattr(traceback, "MEMORY_BUDGET_ANNOTATION_KEY", None)


def keep_for_backward(node: Node) -> None:
    """Never computed again in backward, whatever `activation_memory_budget` says; for values of a few bytes.

    A budget of 0 would compute everything again: here it becomes the least one, which differs by such values alone.
    """
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    node.meta["ac_graph_id"] = 0
    if functorch_config.activation_memory_budget == 0:
        node.meta["memory_budget"] = LEAST_BUDGET


def memory_budget() -> float:
    """How much may be kept for backward: 1 is all that is useful, 0 the inputs alone."""
    budget: float = functorch_config.activation_memory_budget
    return budget


def is_seed(node: Node) -> bool:
    """Whether Inductor has put this node in the place of a draw, its own ones included."""
    return node.target is torch.ops.prims.inductor_lookup_seed.default


def seeds_of(seed: Node) -> Node:
    """The draw of all seeds of a graph on one device, of which this is one."""
    seeds: Node = seed.args[0]  # type: ignore[assignment]
    return seeds


def give_room_for_seeds(module: GraphModule) -> None:
    """Makes of a region whose budget is 0 one with the least budget: there `keep_for_backward` holds."""
    for child in module.modules():
        if isinstance(child, GraphModule):
            for node in child.graph.nodes:
                if _region_budget(node) == 0:
                    node.meta["custom"] = {**node.meta["custom"], _REGION_BUDGET: LEAST_BUDGET}


def _region_budget(node: Node) -> float | None:
    custom = node.meta.get("custom")
    return custom.get(_REGION_BUDGET) if isinstance(custom, dict) and _REGION_BUDGET else None


def _is_run_again_whole() -> bool:
    """Whether what is recorded now lies in a subgraph of which backward keeps nothing: marks inside do not matter."""
    tracer = proxy_tensor._CURRENT_MAKE_FX_TRACER
    inside = tracer is not None and tracer.is_hop_subgraph_tracer()
    return inside and torch.__version__ < "2.13" and functorch_config.activation_memory_budget == 0


def never_recomputed(op: torch._ops.OpOverload, library: torch.library.Library) -> None:
    """Lets everyone who records a call of `op`, which returns one tensor, keep its result for backward.

    The mark is put on when the call is recorded: checkpoints have marked it to be recomputed by then, and it holds
    for whatever compiles the graph, Inductor without our passes among it.
    """

    def record(mode: ProxyTorchDispatchMode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result: Any = mode.__torch_dispatch__(func, types, args, kwargs or {})
        recorded: Any = get_proxy_slot(result, mode.tracer, None)
        if recorded is not None:
            if _region_budget(recorded.proxy.node) == 0:
                raise RuntimeError(
                    "region_activation_memory_budget: expected a budget above 0 around a random draw of fuse_pass, "
                    "got 0, with which PyTorch draws again in backward and gradients would be wrong; "
                    "use 1e-9, the global activation_memory_budget=0, or backend='fuse_pass'"
                )
            if _is_run_again_whole():
                raise RuntimeError(
                    "activation_memory_budget: expected a budget above 0 around a random draw of fuse_pass in a "
                    "subgraph (nested_compile_region), got 0, with which this PyTorch runs the subgraph again in "
                    "backward and gradients would be wrong; use 1e-9, or torch 2.13 or newer"
                )
            keep_for_backward(recorded.proxy.node)
        return result

    torch.library.register_torch_dispatch(op._name, ProxyTorchDispatchMode, record, lib=library)


def onednn_linear() -> torch._ops.OpOverload | None:
    """oneDNN's `a @ b.T + bias` with an activation as post-operation, on plain weights; None where it is absent."""
    if not torch.backends.mkldnn.is_available():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default


def onednn_linear_add() -> torch._ops.OpOverload:
    """oneDNN's `a @ b.T + bias + other`, called with a, other, b, bias and "add"; there where `onednn_linear` is."""
    add: torch._ops.OpOverload = torch.ops.mkldnn._linear_pointwise.binary
    return add


@functools.cache
def onednn_version() -> str:
    """The version of oneDNN in this build of PyTorch, e.g. `3.12.0`; `unknown` where the build does not tell."""
    found = re.search(r"(?:MKL-DNN|oneDNN) v([\d.]+)", torch.__config__.show())
    return found[1] if found else "unknown"


def pack_onednn_weight(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of a `[n, k]` weight in oneDNN's own order for so many rows; opaque but to `onednn_linear`."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def int_mm() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """`int8 [m, k] @ int8 [k, n] → int32 [m, n]`; None where it is absent."""
    return getattr(torch, "_int_mm", None)


def has_fast_cpu_dtype(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of this half type in hardware."""
    name = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}[dtype]
    query = getattr(torch.ops.mkldnn, name, None)
    return bool(query is not None and query())


def is_compiling() -> bool:
    """Whether the calls that are made now are written into a graph, and not run."""
    return get_proxy_mode() is not None


@functools.cache
def has_vector_loops() -> bool:
    """Whether Inductor knows vector instructions of this CPU."""
    return bool(pick_vec_isa())


def vector_instructions() -> str:
    """Those for which Inductor writes loops on this CPU, e.g. `avx2`; the width of a loop is in its source."""
    return str(pick_vec_isa())


def size_hint(size: int | torch.SymInt) -> int | None:
    """The example value of a size; never adds a guard. None for a size that is only known at run time."""
    return size if isinstance(size, int) else size.node.hint


def is_inductor_option(name: str) -> bool:
    return name.replace("-", "_") in inductor_config.get_config_copy()


def is_known_backend(name: str) -> bool:
    """Whether `torch.compile` has this name by now, from an entry point or a registration; looks for no more."""
    return name in registry._BACKENDS


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


def rounds_quotients() -> bool:
    """Whether float32 quotients on a GPU are those of IEEE 754 in what runs, or is compiled, now."""
    rounds: bool = inductor_config.eager_numerics.division_rounding
    return rounds or not is_compiling()


def inductor_compiler(mode: str | None, options: Mapping[str, Any] | None) -> Any:
    """Inductor as a callable (graph module, example inputs) → compiled function; its `.config` holds the patches."""
    return torch._TorchCompileInductorWrapper(mode, dict(options or {}), None)


# --- calls of compiled functions --------------------------------------------------------------------------------------


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
