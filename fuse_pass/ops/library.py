"""Defines an op once for all that must know it: dispatcher, fake tensors, autograd, autocast and Inductor.

Every op of fuse_pass is opaque to autograd (we decide what is saved for backward) and, unless it wraps a library
kernel, transparent to Inductor: its eager body is registered as its decomposition, so that it fuses with its
neighbours. Every op can be written in aten operations alone, for programs that run without fuse_pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fuse_pass.inductor import compat, private
from fuse_pass.inductor.reach import Reach, going, reach

LIBRARY = torch.library.Library("fuse_pass", "DEF")

_IN_ATEN: dict[private.OpOverload, Callable[..., Any]] = {}


def define(
    name: str,
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    dispatch_key: str = "CompositeExplicitAutograd",
    in_aten: Callable[..., Any] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> private.OpOverload:
    """Registers `fuse_pass::name` with its eager `body` and its `fake` kernel (shapes only, adds no guards).

    Args:
        name: op name inside the namespace.
        schema: arguments and results, as in `(Tensor x) -> Tensor`.
        body: plain aten code that allocates its results; also what Inductor sees, unless there is `in_aten`.
        fake: the same signature on fake tensors.
        dispatch_key: where the body is registered.
        in_aten: for ops that call a library kernel and stay one call: what takes their place where that is missing.
        tags: further operator tags.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    LIBRARY.impl(name, body, dispatch_key)
    torch.library.register_fake(f"fuse_pass::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.fuse_pass, name).default
    if in_aten is None:
        compat.register_decomposition(op, body)
    _IN_ATEN[op] = in_aten or body
    return op  # type: ignore[no-any-return]


def call(op: private.OpOverload, *args: Any) -> Any:
    """A call of an op from within the body of another: of the op itself, or in the open where nobody will know it."""
    return op(*args) if reach() is Reach.HERE else _IN_ATEN[op](*args)


def in_aten() -> Mapping[private.OpOverload, Callable[..., Any]]:
    """For every op, what it computes by aten operations alone, right on every machine."""
    return {op: _going_anywhere(body) for op, body in _IN_ATEN.items()}


def _going_anywhere(body: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        with going(Reach.ANYWHERE):
            return body(*args, **kwargs)

    return run


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
