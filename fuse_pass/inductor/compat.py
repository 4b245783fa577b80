"""What fuse_pass asks of PyTorch's operators and of its build, the same for torch 2.11 to 2.15.

Nothing here loads Dynamo or Inductor before one of them compiles: eager code needs neither. What is asked of these two
is in `compiler`.
"""

from __future__ import annotations

import functools
import getpass
import os
import re
import tempfile
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch.fx import GraphModule, Node, traceback
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_mode, get_proxy_slot
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy

from fuse_pass.inductor.loading import when_loaded
from fuse_pass.inductor.reach import Reach, reach

__all__ = [
    "LEAST_BUDGET",
    "announce_backend",
    "cache_dir",
    "disable_current_modes",
    "give_room_for_seeds",
    "has_fast_cpu_dtype",
    "has_vector_loops",
    "inductor_seed",
    "int_mm",
    "is_compiling",
    "keep_for_backward",
    "memory_budget",
    "never_merge",
    "never_merge_seeds_of_inductor",
    "never_recomputed",
    "onednn_linear",
    "onednn_linear_add",
    "onednn_version",
    "pack_onednn_weight",
    "register_decomposition",
    "rounds_quotients",
    "size_hint",
    "stored_once",
    "vector_instructions",
]


def announce_backend(name: str, target: str) -> None:
    """Lets `torch.compile` know a backend by name, which is loaded when somebody asks for it.

    Args:
        name: what `torch.compile(backend=name)` is given.
        target: where the backend is, as in the entry points of a package: `package.module:object`.
    """
    entry_point = EntryPoint(name, target, "torch_dynamo_backends")
    when_loaded("torch._dynamo.backends.registry", lambda registry: registry._BACKENDS.setdefault(name, entry_point))


def register_decomposition(op: torch._ops.OpOverload, body: Callable[..., Any]) -> None:
    """Makes `op` transparent to Inductor: it sees the aten calls of `body` instead of an opaque call."""

    def register(decomposition: ModuleType) -> None:
        decomposition.register_decomposition([op])(body)
        # The merged table is cached at the first compilation; without this the op stays opaque ever after.
        decomposition.fast_random_decomps.cache_clear()

    when_loaded("torch._inductor.decomposition", register)


def inductor_seed(device: torch.device) -> torch.Tensor:
    """A fresh 63-bit seed (0-d int64) that follows `torch.manual_seed`; Inductor draws all seeds of a graph at once."""
    if reach() is Reach.ANYWHERE:
        # Both draws in one, or the first, which nobody reads, would be cut out of a graph.
        return torch.randint(2**63 - 1, (2,), device=device)[1]
    if not _may_call_inductor():
        # As where Inductor's op is run: it draws once for the shape of its result, and once more for the result.
        torch.randint(2**63 - 1, (), device=device)
        return torch.randint(2**63 - 1, (), device=device)
    seed: torch.Tensor = _inductor_prims().inductor_seed(device)
    return seed


def stored_once(x: torch.Tensor) -> torch.Tensor:
    """`x` itself; Inductor computes it in one kernel, and all who read it load it instead of computing it again.

    If x is an input of the graph, or becomes one by simplification, the result is that input, and AOTAutograd does not
    know it: kept for backward, it would be taken as memory to write to. So either x is computed for certain, or the
    result must be recomputed in backward (`joint.recompute`).
    """
    if not _may_call_inductor():
        return x
    stored: torch.Tensor = _inductor_prims().inductor_force_stride_order(x, x.stride())
    return stored


def _may_call_inductor() -> bool:
    """Whether what is called now is written into a graph, and one that only Inductor has to understand."""
    # Dynamo, which may look into a function that calls ours, knows the answer to the first question.
    return (torch.compiler.is_compiling() or is_compiling()) and reach() is not Reach.ANYWHERE


def _inductor_prims() -> Any:
    """The namespace of Inductor's own ops, which are defined where Inductor is imported."""
    import torch._inductor.inductor_prims

    return torch.ops.prims


def never_merge(*ops: torch._ops.OpOverloadPacket) -> None:
    """Tells AOTAutograd that two calls of these ops are two draws, and no common subexpression."""

    def extend(compile_utils: ModuleType) -> None:
        known = compile_utils.rand_ops
        known.extend(op for op in ops if op not in known)

    when_loaded("torch._functorch.compile_utils", extend)


def never_merge_seeds_of_inductor() -> None:
    """The same for the op that `inductor_seed` leaves in graphs."""
    when_loaded("torch._inductor.inductor_prims", lambda _: never_merge(torch.ops.prims.inductor_seed))


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
    """Whether Inductor, which this loads, knows vector instructions of this CPU."""
    return bool(_vector_instructions())


def vector_instructions() -> str:
    """Those for which Inductor writes loops on this CPU, e.g. `avx2`; the width of a loop is in its source."""
    return str(_vector_instructions())


def _vector_instructions() -> Any:
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return pick_vec_isa()


def cache_dir() -> str:
    """The folder in which Inductor keeps what it has compiled, and we what we have measured; it need not exist yet."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if folder is None:
        folder = os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", _user_name()))
    return os.path.abspath(folder)


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):  # a process in a container may run as a user without a name
        return f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"


def size_hint(size: int | torch.SymInt) -> int | None:
    """The example value of a size; never adds a guard. None for a size that is only known at run time."""
    return size if isinstance(size, int) else size.node.hint


def rounds_quotients() -> bool:
    """Whether float32 quotients on a GPU are those of IEEE 754 in what runs, or is compiled, now."""
    if not is_compiling():
        return True
    from torch._inductor import config

    rounds: bool = config.eager_numerics.division_rounding
    return rounds
