"""Private parts of PyTorch under names of ours, for every room above: where PyTorch changes one, it is mended here.

They are those that `import torch` loads anyway; `compiler` has those of Dynamo and Inductor, `debugging` those that
only measurements and tests need.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses import fake_tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

ModuleT = TypeVar("ModuleT", bound=nn.Module)

__all__ = [
    "AUTOCAST_ENTER",
    "AUTOCAST_EXIT",
    "ENCODER_LAYER",
    "GRAD_SWITCHES",
    "NATIVE_MULTI_HEAD_ATTENTION",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "address_of",
    "buffers_of",
    "children_of",
    "contiguous_strides_of",
    "fake_mode_of",
    "has_hooks",
    "has_policy",
    "is_fake",
    "is_plain_class",
    "is_transformed",
    "lazy_graph_module",
    "make_fx",
    "may_write",
    "parameters_of",
    "prims",
    "share_source",
    "take_calling_convention",
    "take_hooks",
    "tree_leaves",
    "tree_map",
    "uncompiled",
    "unsafe_view",
    "unwrapped",
    "version_of",
    "with_own_tensors",
    "without_autocast",
]

prims = torch.ops.prims

# What Dynamo writes into its graphs.
ENCODER_LAYER = torch._transformer_encoder_layer_fwd
NATIVE_MULTI_HEAD_ATTENTION = torch._native_multi_head_attention
GRAD_SWITCHES = (torch._C._set_grad_enabled, torch.autograd.grad_mode.set_grad_enabled)
AUTOCAST_ENTER, AUTOCAST_EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


# --- tensors

_is_fake_tensor: Callable[[object], bool] | None = getattr(fake_tensor, "is_fake_tensor", None)


def is_fake(value: object) -> bool:
    """Whether a value is a fake tensor: from torch 2.14 on it need not be of a Python class of its own."""
    if _is_fake_tensor is None:
        return isinstance(value, fake_tensor.FakeTensor)
    return _is_fake_tensor(value)


def is_plain_class(value: Tensor) -> bool:
    """Whether a fake tensor stands for an ordinary tensor or Parameter, and for no subclass."""
    return type(value) in (fake_tensor.FakeTensor, Tensor, nn.Parameter)


def fake_mode_of(value: object) -> Any:
    """The mode, a context, in which operations on a fake tensor are fake too; None for any other value."""
    return fake_tensor.maybe_get_fake_mode(value) if is_fake(value) else None


def is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func.vmap, grad or their like wrap the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """What the innermost transform of torch.func wraps."""
    return torch._C._functorch.get_unwrapped(tensor)


def address_of(tensor: Tensor) -> int:
    """The same for two tensors that share memory; fake ones, which have none, included."""
    storage: int = tensor.untyped_storage()._cdata
    return storage


def version_of(tensor: Tensor) -> int:
    """Counts the writes that autograd knows of."""
    return tensor._version


def contiguous_strides_of(shape: Any) -> tuple[Any, ...]:
    return tuple(make_contiguous_strides_for(shape))


def unsafe_view(x: Tensor, shape: Any) -> Tensor:
    """`x.view(shape)` that autograd takes as memory of its own; right where nobody keeps x."""
    result: Tensor = torch.ops.aten._unsafe_view(x, shape)
    return result


# --- modules


def has_hooks(module: nn.Module) -> bool:
    """Whether anything but `forward` runs when a module is called."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def take_hooks(module: nn.Module, other: nn.Module) -> None:
    """Gives a module the hooks of another, in front of those of its own, but for the ones that it has already."""
    for name in _HOOKS:
        own, taken = getattr(module, name), getattr(other, name)
        setattr(module, name, type(own)({**taken, **own}))
    module._is_full_backward_hook = other._is_full_backward_hook


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """A module's own, as it keeps them: None, and twice the same one, included."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """A module's own, as it keeps them."""
    return module._buffers


def with_own_tensors(module: ModuleT) -> ModuleT:
    """A module of the same parameters and buffers, which can be given others without a change to the first."""
    other = copy.copy(module)
    other._parameters, other._buffers = dict(module._parameters), dict(module._buffers)
    return other


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own, as it keeps them."""
    return module._modules


def uncompiled(model: Any) -> Any:
    """The function or module that `torch.compile` has wrapped; any other as it is."""
    model = getattr(model, "_orig_mod", model)  # first: a wrapped module names its bare `forward` too
    return getattr(model, "_torchdynamo_orig_callable", model)


# --- ops


def may_write(op: OpOverload | OpOverloadPacket) -> bool:
    """Whether an op, or any of its overloads, writes into an argument."""
    overloads = [op] if isinstance(op, OpOverload) else [getattr(op, name) for name in op.overloads()]
    return any(overload._schema.is_mutable for overload in overloads)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Ops that are called inside do not see autocast."""
    guard: contextlib.AbstractContextManager[Any] = torch._C._ExcludeDispatchKeyGuard(_autocast_keys(device_type))
    return guard


@functools.cache
def _autocast_keys(device_type: str) -> Any:
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))


# --- graphs


def lazy_graph_module(module: GraphModule, graph: Graph) -> GraphModule:
    """A graph with what a module holds, as Dynamo's own: its code is written when somebody asks for it."""
    with _use_lazy_graph_module(True):
        return _make_graph_module(module, graph)


def take_calling_convention(graph: Graph, other: Graph) -> None:
    """Lets the code of a graph take arguments and give results as that of another does: structures, or flat."""
    graph.set_codegen(other._codegen)


def share_source(original: Node, twin: Node) -> None:
    """Lets a node know as well where in the user's program its value comes from, if the original does."""
    if hasattr(original, "_dynamo_source"):
        twin._dynamo_source = original._dynamo_source


def has_policy(body: GraphModule) -> bool:
    """Whether it is the body of a selective checkpoint."""
    return "_checkpoint_context_fn" in body.meta
