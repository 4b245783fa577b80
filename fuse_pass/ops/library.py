"""Defines an op once for all that must know it: dispatcher, fake tensors, autograd, autocast and Inductor.

Every op of fuse_pass is opaque to autograd (we decide what is saved for backward) and, unless it wraps a library
kernel, transparent to Inductor: its eager body is registered as its decomposition, so that it fuses with its
neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fuse_pass.inductor import compat, private

LIBRARY = torch.library.Library("fuse_pass", "DEF")


def define(
    name: str,
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    dispatch_key: str = "CompositeExplicitAutograd",
    decompose: bool = True,
    tags: Sequence[torch.Tag] = (),
) -> private.OpOverload:
    """Registers `fuse_pass::name` with its eager `body` and its `fake` kernel (shapes only, adds no guards).

    Args:
        name: op name inside the namespace.
        schema: arguments and results, as in `(Tensor x) -> Tensor`.
        body: plain aten code that allocates its results; also the decomposition for Inductor if `decompose`.
        fake: the same signature on fake tensors.
        dispatch_key: where the body is registered.
        decompose: False for ops that call a library kernel and stay one call.
        tags: further operator tags.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    LIBRARY.impl(name, body, dispatch_key)
    torch.library.register_fake(f"fuse_pass::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.fuse_pass, name).default
    if decompose:
        compat.register_decomposition(op, body)
    return op  # type: ignore[no-any-return]


def define_autograd(op: private.OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Registers the gradient of `op`, as `torch.library.register_autograd` does."""
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=LIBRARY)


def define_autocast(op: private.OpOverload, device_type: str, rule: Callable[..., Any]) -> None:
    """Under autocast on `device_type`, `op(*args)` becomes `rule(op, *args)`, which runs with autocast off."""

    def kernel(*args: Any) -> Any:
        with private.without_autocast(device_type):
            return rule(op, *args)

    LIBRARY.impl(op, kernel, f"Autocast{device_type.upper()}")


def cast_for_autocast(value: Any, device_type: str) -> Any:
    """What autocast does to an argument of a matrix product: half precision, unless it is float64 or elsewhere."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64:
        return value.to(torch.get_autocast_dtype(device_type)) if value.device.type == device_type else value
    return value


def autocast_as_products(*ops: private.OpOverload) -> None:
    """Lets autocast, on CPU and CUDA, cast every argument of these ops as it casts those of `F.linear`."""
    for op in ops:
        for device_type in ("cpu", "cuda"):
            define_autocast(op, device_type, functools.partial(_cast_arguments, device_type))


def _cast_arguments(device_type: str, op: private.OpOverload, *arguments: Any) -> Any:
    return op(*(cast_for_autocast(argument, device_type) for argument in arguments))


def placeholders(like: Tensor, count: int) -> list[Tensor]:
    """Empty tensors for results that nobody asked for: one each, for the results of an op may not alias."""
    return [like.new_empty(0) for _ in range(count)]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything narrower is summed in float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def differentiable_grads(
    formula: Callable[..., Tensor], tensors: Any, settings: tuple[Any, ...], needed: list[bool], grad_y: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of `formula(*tensors, *settings)` that can be differentiated again (`create_graph=True`).

    By `torch.func.vjp`, which takes the arguments as independent even where one was computed from another.
    """
    wanted = [i for i, need in enumerate(needed) if need]

    def of_wanted(*values: Tensor) -> Tensor:
        arguments = list(tensors)
        for i, value in zip(wanted, values, strict=True):
            arguments[i] = value
        return formula(*arguments, *settings)

    _, vjp = torch.func.vjp(of_wanted, *(tensors[i] for i in wanted))  # type: ignore[misc]  # 2 results without aux
    grads = dict(zip(wanted, vjp(grad_y), strict=True))
    return tuple(grads.get(i, grad_y) for i in range(len(needed)))


def only_needed(grads: tuple[Tensor, ...], needed: list[bool], total: int) -> tuple[Tensor | None, ...]:
    """What a backward returns for `total` arguments: the gradients that were asked for, and None."""
    kept = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return (*kept, *(None,) * (total - len(kept)))
