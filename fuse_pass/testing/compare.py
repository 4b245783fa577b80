"""Is a compiled program wrong? Eager, stock `torch.compile` and fuse_pass side by side, against eager float64.

Wrong is an element beyond twice eager's own error plus two ulp, or other positions of NaN and infinities, shapes,
dtypes, strides, aliases, missing gradients, mutated inputs, or a random draw where eager makes none. What stock
`torch.compile` does in the same way is PyTorch's, not ours.

An error bound taken from a handful of rounded numbers is itself noise. Before a value counts as wrong, eager's error is
taken from more data, and so is ours: it must be beyond the larger bound for at least two sets of data.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fuse_pass.report import Report, collect
from fuse_pass.testing import levels, masks
from fuse_pass.testing.observe import Round, build, observe
from fuse_pass.testing.precision import allowed_error, error
from fuse_pass.testing.program import load

_MORE_DATA = 5
_ENOUGH = 2


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


class Status(enum.StrEnum):
    """What is known of a program after it was run."""

    RIGHT = "right"
    WRONG = "wrong"
    REFUSED = "eager PyTorch refuses it"
    AS_STOCK = "different from eager, as torch.compile is"
    NOISE = "beyond the bound for one set of data only"


@dataclass
class Verdict:
    """Status, the differences behind it, and what fuse_pass reported."""

    status: Status
    differences: list[Difference] = field(default_factory=list)
    report: Report = field(default_factory=Report)

    def __str__(self) -> str:
        return "\n".join([str(self.status), *(f"  {difference}" for difference in self.differences[:8])])


Runs = list[Round]


class _Contenders:
    """The runs of one program, each made when it is asked for."""

    def __init__(self, text: str, level: str) -> None:
        self.level = level
        self.narrow, self.wide = load(text), load(text, exact=True)
        self.dtype: torch.dtype = getattr(torch, self.narrow["SETTINGS"]["dtype"])
        self.seed: int = self.narrow["SETTINGS"]["seed"]
        self.model = build(self.narrow, self.dtype)
        self.exact_model = build(self.wide, torch.float64)

    def compiled(self, backend: levels.Backend) -> Callable[[int], Runs]:
        torch._dynamo.reset()
        call = torch.compile(self.model, backend=backend)
        return lambda seed: observe(self.narrow, self.model, call, self.dtype, seed)

    def eager(self, seed: int) -> Runs:
        with masks.in_eager():
            return observe(self.narrow, self.model, self.model, self.dtype, seed)

    def exact(self, seed: int) -> Runs:
        with masks.in_eager():
            return observe(self.wide, self.exact_model, self.exact_model, torch.float64, seed)


def check(text: str, level: str = "aot") -> Verdict:
    """Runs the text of a program all ways.

    Args:
        text: defines `Model`, `INPUTS` and `SETTINGS`.
        level: what stands behind fuse_pass, one of `levels.LEVELS`.
    """
    with levels.ready_to_compare():
        contenders = _Contenders(text, level)
        seed = contenders.seed
        try:
            eager, exact = contenders.eager(seed), contenders.exact(seed)
        except (RuntimeError, ValueError, TypeError, IndexError) as refusal:  # what PyTorch raises for such a program
            return Verdict(Status.REFUSED, [Difference("eager", "exception", _one_line(refusal))])
        run = contenders.compiled(levels.fused(level))
        with collect() as report:
            try:
                found = list(_differences(run(seed), eager, exact))
            except Exception as failure:  # whatever is raised is a finding
                found = [Difference("compiled", "exception", _one_line(failure))]
        if not found:
            return Verdict(Status.RIGHT, report=report)
        status = Status.WRONG
        if all(difference.aspect == "value" for difference in found):
            found, status = _with_more_data(contenders, run, found)
        ours = _beyond_stock(contenders, found, eager, exact) if status is Status.WRONG else found
        return Verdict(status, ours, report) if ours else Verdict(Status.AS_STOCK, found, report)


def _one_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else ''}"[:300]


def _beyond_stock(contenders: _Contenders, found: list[Difference], eager: Runs, exact: Runs) -> list[Difference]:
    """Without the differences that `torch.compile` alone shows too."""
    try:
        theirs = list(_differences(contenders.compiled(levels.stock(contenders.level))(contenders.seed), eager, exact))
    except Exception as failure:  # it fails by itself
        theirs = [Difference("compiled", "exception", _one_line(failure))]
        found = [difference for difference in found if difference.aspect != "exception"]
    shown = {(difference.where, difference.aspect) for difference in theirs}
    return [difference for difference in found if (difference.where, difference.aspect) not in shown]


def _with_more_data(
    contenders: _Contenders, run: Callable[[int], Runs], found: list[Difference]
) -> tuple[list[Difference], Status]:
    """The differences that remain when eager's error is the largest of several runs."""
    seeds = [contenders.seed + 101 * i for i in range(1, _MORE_DATA + 1)]
    triples = [(run(seed), contenders.eager(seed), contenders.exact(seed)) for seed in (contenders.seed, *seeds)]
    noise: dict[str, float] = {}
    for _, eager, exact in triples:
        for name, _, value, truth in _values(eager, eager, exact):
            largest = truth.abs().max().item() if truth.numel() else 0.0
            relative = error(value, truth) / largest if largest else 0.0
            noise[_in_any_round(name)] = max(noise.get(_in_any_round(name), 0.0), relative)
    remaining = [list(_differences(*triple, noise)) for triple in triples]
    failing = [differences for differences in remaining if differences]
    if len(failing) >= _ENOUGH:
        return failing[0], Status.WRONG
    return found, Status.NOISE if failing else Status.RIGHT


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


def _differences(ours: Runs, eager: Runs, exact: Runs, noise: dict[str, float] | None = None) -> Iterator[Difference]:
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
    if not torch.equal(_kinds(ours), _kinds(eager)):
        yield Difference(name, "positions of NaN and infinities", f"{ours}, eager has {eager}"[:200])
        return
    finite = torch.isfinite(eager) & torch.isfinite(exact)
    value, reference, truth = ours[finite], eager[finite], exact[finite]
    if not ours.is_floating_point() or truth.numel() == 0:
        return
    largest = truth.abs().max().item()
    dtype = ours.dtype
    if dtype is torch.float64:  # the reference is no better than what is tested: sums in another order may differ
        allowed = 1e-11 * largest + 2 * error(reference, truth) + 2 * noise * largest
    else:
        allowed = allowed_error(max(error(reference, truth), noise * largest), truth, dtype)
    mine = error(value, truth)
    if mine > allowed:
        yield Difference(
            name, "value", f"error {mine:.3g}, eager's {error(reference, truth):.3g}, allowed {allowed:.3g}"
        )


def _kinds(tensor: Tensor) -> Tensor:
    """0 for a finite number, 1 for NaN, 2 and 3 for the infinities."""
    wide = tensor.double() if tensor.is_floating_point() else torch.zeros_like(tensor, dtype=torch.float64)
    return torch.isnan(wide) + 2 * torch.isposinf(wide) + 3 * torch.isneginf(wide)
