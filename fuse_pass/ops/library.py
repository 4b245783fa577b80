"""Defines an op once for all that must know it: dispatcher, fake tensors, autograd, autocast and Inductor.

Every op of fuse_pass is opaque to autograd (we decide what is saved for backward) and, unless it wraps a library
kernel, transparent to Inductor: its eager body is registered as its decomposition, so that it fuses with its
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

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
