"""What a run does differently from eager PyTorch: numbers beyond their bound, and everything that is not a number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse_pass.testing.observe import Round
from fuse_pass.testing.precision import allowed_error, error

Runs = list[Round]


# Where eager's relative error is this large, it has no digit to compare with, and what it errs is one draw from a heavy
# tail: ours may err so many times as much.
_NO_DIGIT, _TAIL = 0.5, 16


@dataclass(frozen=True)
class Difference:
    """One thing that is not as in eager.

    Attributes:
        where: e.g. `round 0: output 1`.
        aspect: e.g. `strides`; `value` where numbers are too far off.
        detail: both sides.
    """

    where: str
    aspect: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.aspect}: {self.detail}"


def _in_any_round(name: str) -> str:
    return name.split(": ", 1)[1]


def _values(ours: Runs, eager: Runs, exact: Runs) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, ours, eager's and the exact value of everything that both have."""
    for i, runs in enumerate(zip(ours, eager, exact, strict=True)):
        mine, its, true = (_tensors(run) for run in runs)
        for name, eager_value in its.items():
            value, truth = mine.get(name), true.get(name)
            if value is not None and eager_value is not None and truth is not None:
                yield f"round {i}: {name}", value, eager_value, truth


def _tensors(run: Round) -> dict[str, Tensor | None]:
    return {
        **{f"output {i}": value for i, value in enumerate(run.outputs)},
        **{f"input {i} after the call": value for i, value in enumerate(run.inputs)},
        **{f"gradient of {name}": value for name, value in run.grads.items()},
        **{f"buffer {name}": value for name, value in run.buffers.items()},
    }


def noise_of(pairs: Iterable[tuple[Runs, Runs]]) -> dict[str, float]:
    """Largest error over several sets of data, by value, relative to its largest element.

    Args:
        pairs: runs of eager (or of the reference itself for data that are hardly others) and the exact ones.
    """
    noise: dict[str, float] = {}
    for eager, exact in pairs:
        for name, _, value, truth in _values(eager, eager, exact):
            if not truth.is_floating_point():
                continue
            finite = torch.isfinite(value) & torch.isfinite(truth)
            value, truth = value[finite], truth[finite]
            largest = truth.abs().max().item() if truth.numel() else 0.0
            relative = error(value, truth) / largest if largest else 0.0
            noise[_in_any_round(name)] = max(noise.get(_in_any_round(name), 0.0), relative)
    return noise


def differences(ours: Runs, eager: Runs, exact: Runs, noise: dict[str, float] | None = None) -> Iterator[Difference]:
    """Differences of ours from eager; `noise` is the relative error by value where one set of data is too few."""
    for i, (a, b) in enumerate(zip(ours, eager, strict=True)):
        yield from _structure(f"round {i}", a, b)
    for name, value, eager_value, truth in _values(ours, eager, exact):
        if (value.shape, value.dtype) == (eager_value.shape, eager_value.dtype) and truth.shape == value.shape:
            yield from _numbers(name, value, eager_value, truth, (noise or {}).get(_in_any_round(name), 0.0))


def _structure(where: str, ours: Round, eager: Round) -> Iterator[Difference]:
    facts = {
        "number of outputs": (len(ours.outputs), len(eager.outputs)),
        "requires_grad of outputs": (ours.requires_grad, eager.requires_grad),
        "aliases": (sorted(ours.aliases), sorted(eager.aliases)),
        "random draws": (ours.draws and not eager.draws, False),  # a dropout that nobody reads may go
        "state of the generator changes": (ours.moves_generator, eager.moves_generator),
        "gradients": (
            [name for name, grad in ours.grads.items() if grad is not None],
            [name for name, grad in eager.grads.items() if grad is not None],
        ),
    }
    for aspect, (a, b) in facts.items():
        if a != b:
            yield Difference(where, aspect, f"{a}, eager has {b}")
    for i, (x, y) in enumerate(zip(ours.outputs, eager.outputs, strict=False)):
        for aspect, a, b in (
            ("shape", tuple(x.shape), tuple(y.shape)),
            ("dtype", x.dtype, y.dtype),
            ("strides", _strides(x), _strides(y)),
        ):
            if a != b:
                yield Difference(f"{where}: output {i}", aspect, f"{a}, eager has {b}")
    for name, grad in eager.grads.items():
        mine = ours.grads.get(name)
        if grad is not None and mine is not None and (mine.dtype, mine.shape) != (grad.dtype, grad.shape):
            detail = f"{mine.dtype} {tuple(mine.shape)}, eager has {grad.dtype} {tuple(grad.shape)}"
            yield Difference(f"{where}: gradient of {name}", "dtype or shape", detail)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Those that say where elements lie."""
    if tensor.numel() == 0:
        return ()
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def _numbers(name: str, ours: Tensor, eager: Tensor, exact: Tensor, noise: float) -> Iterator[Difference]:
    # Where eager alone leaves the range of its dtype, ours may be the number that it should be.
    better = torch.isfinite(ours) & ~torch.isfinite(eager) & torch.isfinite(exact)
    # Where the number is beyond that range, either may give what its order of summation makes of an overflow.
    neither = ~torch.isfinite(ours) & ~torch.isfinite(eager) & _is_beyond_range(exact, ours.dtype)
    if ((_kinds(ours) != _kinds(eager)) & ~better & ~neither).any():
        yield Difference(name, "positions of NaN and infinities", f"{ours}, eager has {eager}"[:200])
        return
    finite = torch.isfinite(eager) & torch.isfinite(exact)
    value, reference, truth = ours[finite], eager[finite], exact[finite]
    if not ours.is_floating_point() or truth.numel() == 0:
        return
    largest = truth.abs().max().item()
    dtype = ours.dtype
    eager_error = max(error(reference, truth), noise * largest)
    if dtype is torch.float64:  # the reference is no better than what is tested: sums in another order may differ
        allowed = 1e-11 * largest + 2 * error(reference, truth) + 2 * noise * largest
    else:
        allowed = allowed_error(eager_error, truth, dtype)
    if noise >= _NO_DIGIT:
        allowed *= _TAIL
    mine = error(value, truth)
    if mine > allowed:
        yield Difference(
            name, "value", f"error {mine:.3g}, eager's {error(reference, truth):.3g}, allowed {allowed:.3g}"
        )


def _is_beyond_range(exact: Tensor, dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        return torch.zeros_like(exact, dtype=torch.bool)
    return torch.isfinite(exact) & (exact.abs() > torch.finfo(dtype).max)


def _kinds(tensor: Tensor) -> Tensor:
    """0 for a finite number, 1 for NaN, 2 and 3 for the infinities."""
    wide = tensor.double() if tensor.is_floating_point() else torch.zeros_like(tensor, dtype=torch.float64)
    return torch.isnan(wide) + 2 * torch.isposinf(wide) + 3 * torch.isneginf(wide)
