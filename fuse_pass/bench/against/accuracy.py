"""How far results are from the model's in float64, and whether they are of the kind that was asked for.

A contender that is fast because it computes something else is no contender: float32 where int8 was asked for, half the
model, or the wrong numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuse_pass.bench.against.contender import FLOAT, INT4_WEIGHT_ONLY, INT8, INT8_WEIGHT_ONLY, Task
from fuse_pass.bench.contenders import tensors_of
from fuse_pass.commands.errors import CommandError


@dataclass(frozen=True)
class Plausible:
    """Relative errors between which results are taken for those of a kind of arithmetic."""

    least: float
    most: float


# 8 bits for numbers of a normal distribution give about 5e-3, 4 bits in groups of 64 about 0.1, float32 1e-7 to 1e-5;
# whole models add up to more. Results that have nothing to do with the model's are off by 1.4.
_LOW = {INT8: Plausible(1e-4, 0.5), INT8_WEIGHT_ONLY: Plausible(1e-4, 0.5), INT4_WEIGHT_ONLY: Plausible(1e-3, 0.7)}
_FLOAT = {torch.float32: Plausible(0, 1e-3), torch.bfloat16: Plausible(0, 0.1)}


def in_float64(task: Task) -> list[Tensor]:
    """What the model gives in float64, in eager PyTorch."""
    model = copy.deepcopy(task.example.model).double()
    args, kwargs = _doubled(task.example.args), _doubled(task.example.kwargs)
    with torch.no_grad():
        return tensors_of(model(*args, **kwargs))


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)([_doubled(part) for part in value])
    return {key: _doubled(part) for key, part in value.items()} if isinstance(value, dict) else value


def relative_error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Norm of the difference by the norm of the truth, over all results together.

    Raises:
        CommandError: there are other results, or of other shapes.
    """
    shapes, expected = ([tuple(tensor.shape) for tensor in tensors] for tensors in (results, truth))
    if shapes != expected:
        raise CommandError(f"computes something else: results of shapes {shapes}, where {expected} were expected")
    difference, size = (
        torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        for tensors in ([ours.double() - theirs for ours, theirs in zip(results, truth, strict=True)], truth)
    )
    return float(difference.norm() / size.norm().clamp_min(torch.finfo(torch.float64).tiny))


def check(error: float, task: Task) -> None:
    """Holds a contender to the kind of arithmetic that was asked for.

    Raises:
        CommandError: no arithmetic of this kind has such an error.
    """
    bounds = _FLOAT.get(task.dtype, _FLOAT[torch.bfloat16]) if task.kind == FLOAT else _LOW[task.kind]
    if error < bounds.least:
        raise CommandError(
            f"quantised nothing: its relative error against float64 is {error:.1e}, too small for {task.kind}"
        )
    if not error <= bounds.most:  # nor NaN
        raise CommandError(f"computes something else: its relative error against float64 is {error:.1e}")
