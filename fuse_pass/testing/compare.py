"""Is a compiled program or model wrong? Eager, stock `torch.compile` and fuse_pass side by side, against eager float64.

Wrong is an element beyond twice eager's own error plus two ulp, or other positions of NaN and infinities, shapes,
dtypes, strides, aliases, missing gradients, mutated inputs, or a random draw where eager makes none. What stock
`torch.compile` does in the same way is PyTorch's, not ours.

An error bound taken from a handful of rounded numbers is itself noise. Before a value counts as wrong, eager's error is
taken from more data, and so is ours: it must be beyond the larger bound for at least two sets of data, of six and again
of 24. Where eager computes in float64 it has no error against itself; there it is what eager errs in float32, as many
times smaller as float64 is more exact. Eager's products are taken from both libraries that we may choose from. Float64
is no truth for everything either (the mean of a row of 1e30 is not 1e30): what it gives for inputs that differ in the
last bits, and with rows that are centred first, tells how far it may be relied on.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fuse_pass.report import Report, collect
from fuse_pass.testing import centred, levels, masks, products
from fuse_pass.testing.differences import Difference, Runs, differences, noise_of
from fuse_pass.testing.observe import build, observe
from fuse_pass.testing.program import load

_SETS_OF_DATA = (6, 24)
_ENOUGH = 2
_NEARBY = 1 + 2.0**-50
_FLOAT64_TO_FLOAT32 = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


class Status(enum.StrEnum):
    """What is known of a program after it was run."""

    RIGHT = "right"
    WRONG = "wrong"
    REFUSED = "eager PyTorch refuses it"
    DECLINED = "fuse_pass refuses it by name"
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


class Contenders(Protocol):
    """What is compared, each run made when it is asked for.

    Attributes:
        level: what stands behind fuse_pass, one of `levels.LEVELS`.
        seed: of the first set of data; other seeds give other data.
    """

    level: str
    seed: int

    def compiled(self, backend: levels.Backend) -> Callable[[int], Runs]: ...

    def eager(self, seed: int) -> Runs: ...

    def exact(self, seed: int) -> Runs: ...

    def by_onednn(self, seed: int) -> Runs | None:
        """Eager's runs with the products of oneDNN; None where not offered."""

    def nearby(self, seed: int) -> Runs | None:
        """The exact runs once more for inputs that are other ones by a few of float64's ulp, with layer norms that are
        summed another way; None where not offered.
        """

    def in_float32(self, seed: int) -> Runs | None:
        """Eager's runs in float32 where it computes in float64 itself; None elsewhere."""


class _ProgramRuns:
    """The contenders of one program."""

    def __init__(self, text: str, level: str) -> None:
        self.level = level
        self.narrow, self.wide = load(text), load(text, precision=torch.float64)
        self.dtype: torch.dtype = getattr(torch, self.narrow["SETTINGS"]["dtype"])
        self.seed: int = self.narrow["SETTINGS"]["seed"]
        self.model = build(self.narrow, self.dtype)
        self.exact_model = build(self.wide, torch.float64)
        self.single = load(text, precision=torch.float32) if self.dtype is torch.float64 else None

    def compiled(self, backend: levels.Backend) -> Callable[[int], Runs]:
        torch.compiler.reset()
        call = torch.compile(self.model, backend=backend)
        return lambda seed: observe(self.narrow, self.model, call, self.dtype, seed)

    def eager(self, seed: int) -> Runs:
        with masks.in_eager():
            return observe(self.narrow, self.model, self.model, self.dtype, seed)

    def exact(self, seed: int) -> Runs:
        with masks.in_eager():
            return observe(self.wide, self.exact_model, self.exact_model, torch.float64, seed)

    def by_onednn(self, seed: int) -> Runs | None:
        with products.OneDNNProducts():
            return self.eager(seed)

    def nearby(self, seed: int) -> Runs | None:
        with masks.in_eager(), centred.CentredNorms():
            return observe(self.wide, self.exact_model, self.exact_model, torch.float64, seed, scale=_NEARBY)

    def in_float32(self, seed: int) -> Runs | None:
        if self.single is None:
            return None
        model = build(self.single, torch.float32)
        with masks.in_eager():
            return observe(self.single, model, model, torch.float32, seed)


def check(text: str, level: str = "aot") -> Verdict:
    """Runs the text of a program all ways.

    Three things at level "aot" are looked at again through Inductor. Other infinities: the kernel of `F.gelu` in eager
    PyTorch gives NaN for an infinity in bfloat16, where a written-out GELU and what Inductor makes of either do not.
    And two signs of what PyTorch's partitioner does, which "aot_eager" uses only where a seed has to be kept: it may
    keep an input that the graph writes to (Inductor alone does for `v = x.double().float(); x.copy_(2 * x);
    F.layer_norm(v + v, …)`). Then backward raises, or, for an input without a gradient, gradients are wrong.

    Args:
        text: defines `Model`, `INPUTS` and `SETTINGS`.
        level: what stands behind fuse_pass, one of `levels.LEVELS`.
    """
    with levels.ready_to_compare():
        runs = _ProgramRuns(text, level)
        verdict = judge(runs)
        if verdict.status is not Status.WRONG or level != "aot":
            return verdict
        writes_inputs = any(run.writes_inputs for run in runs.eager(runs.seed))
    if all(_may_be_of_the_level(difference, writes_inputs) for difference in verdict.differences):
        return check(text, "inductor")
    return verdict


def _may_be_of_the_level(difference: Difference, writes_inputs: bool) -> bool:
    if difference.aspect == "exception":
        return "needed for gradient computation has been modified by an inplace operation" in difference.detail
    is_gradient = difference.aspect == "value" and "gradient of" in difference.where
    return difference.aspect == "positions of NaN and infinities" or (writes_inputs and is_gradient)


def judge(contenders: Contenders) -> Verdict:
    """Runs the contenders; to be called in `levels.ready_to_compare()`."""
    seed = contenders.seed
    try:
        eager, exact = contenders.eager(seed), contenders.exact(seed)
    except (RuntimeError, ValueError, TypeError, IndexError) as refusal:  # what PyTorch raises for such a program
        return Verdict(Status.REFUSED, [Difference("eager", "exception", _one_line(refusal))])
    run = contenders.compiled(levels.fused(contenders.level))
    with collect() as report:
        try:
            found = list(differences(run(seed), eager, exact))
        except Exception as failure:  # whatever is raised is a finding
            if _names_the_budget(failure):
                return Verdict(Status.DECLINED, [Difference("compiled", "exception", _one_line(failure))], report)
            found = [Difference("compiled", "exception", _one_line(failure))]
    if not found:
        return Verdict(Status.RIGHT, report=report)
    wrong = found
    if not _are_numbers(found):
        wrong = _beyond_stock(contenders, found, eager, exact)
        run = contenders.compiled(levels.fused(contenders.level))  # compiling the other made it forget
    if wrong and _are_numbers(wrong):
        as_stock = {_in_any_round(difference) for difference in found} - {_in_any_round(it) for it in wrong}
        wrong, status = _with_more_data(contenders, run, wrong, as_stock)
        if status is not Status.WRONG:
            return Verdict(status, wrong, report)
        wrong = _beyond_stock_with_more_data(contenders, wrong)
    return Verdict(Status.WRONG, wrong, report) if wrong else Verdict(Status.AS_STOCK, found, report)


def _are_numbers(found: list[Difference]) -> bool:
    return all(difference.aspect == "value" for difference in found)


def _names_the_budget(failure: Exception) -> bool:
    """A setting under which gradients cannot be right may be refused by its name."""
    return "activation_memory_budget" in str(failure)


def _one_line(failure: Exception) -> str:
    """What was raised; of what Dynamo raises about a backend, whose first line says only that, what the backend did."""
    inner = getattr(failure, "inner_exception", None)
    if isinstance(inner, Exception):
        return f"{type(failure).__name__}: {_one_line(inner)}"[:300]
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else ''}"[:300]


def _beyond_stock(contenders: Contenders, found: list[Difference], eager: Runs, exact: Runs) -> list[Difference]:
    """Without the differences that `torch.compile` alone shows too.

    A memory budget of 0 is PyTorch's own special case, and becomes the least one with fuse_pass: either may be shown.
    """
    found = _not_shown_by(levels.stock(contenders.level), contenders, found, eager, exact)
    if found:
        found = _not_shown_by(levels.stock(contenders.level, least_budget=True), contenders, found, eager, exact)
    return found


def _not_shown_by(
    backend: levels.Backend, contenders: Contenders, found: list[Difference], eager: Runs, exact: Runs
) -> list[Difference]:
    try:
        theirs = list(differences(contenders.compiled(backend)(contenders.seed), eager, exact))
    except Exception as failure:  # it fails by itself
        theirs = [Difference("compiled", "exception", _one_line(failure))]
        found = [difference for difference in found if difference.aspect != "exception"]
    shown = {(difference.where, difference.aspect) for difference in theirs}
    return [difference for difference in found if (difference.where, difference.aspect) not in shown]


def _beyond_stock_with_more_data(contenders: Contenders, wrong: list[Difference]) -> list[Difference]:
    """Without the values that `torch.compile` alone has beyond the same bounds, for the same data."""
    try:
        run = contenders.compiled(levels.stock(contenders.level))
        theirs, status = _with_more_data(contenders, run, wrong, frozenset())
    except Exception:  # it fails by itself, which excuses no number of ours
        return wrong
    shown = {_in_any_round(difference) for difference in theirs} if status is Status.WRONG else set()
    return [difference for difference in wrong if _in_any_round(difference) not in shown]


def _with_more_data(
    contenders: Contenders, run: Callable[[int], Runs], found: list[Difference], as_stock: Set[tuple[str, str]]
) -> tuple[list[Difference], Status]:
    """The differences that remain when eager's error is the largest of several runs, those of `as_stock` left out."""
    for count in _SETS_OF_DATA:
        remaining = [
            [difference for difference in some if _in_any_round(difference) not in as_stock]
            for some in _in_sets_of_data(contenders, run, count)
        ]
        sets = Counter(key for some in remaining for key in {_in_any_round(difference) for difference in some})
        wrong = [difference for some in remaining for difference in some if sets[_in_any_round(difference)] >= _ENOUGH]
        if not wrong:
            return found, Status.NOISE if sets else Status.RIGHT
    return wrong, Status.WRONG


def _in_sets_of_data(contenders: Contenders, run: Callable[[int], Runs], count: int) -> list[list[Difference]]:
    seeds = [contenders.seed + 101 * i for i in range(count)]
    triples = [(run(seed), contenders.eager(seed), contenders.exact(seed)) for seed in seeds]
    noise = noise_of((eager, exact) for _, eager, exact in triples)
    for others in (_by_onednn(contenders, seeds), _nearby(contenders, seeds)):
        for name, value in noise_of(others).items():
            noise[name] = max(noise[name], value)
    for name, value in noise_of(_in_float32(contenders, seeds)).items():
        noise[name] = max(noise[name], value * _FLOAT64_TO_FLOAT32)
    return [list(differences(*triple, noise)) for triple in triples]


def _by_onednn(contenders: Contenders, seeds: Sequence[int]) -> Iterator[tuple[Runs, Runs]]:
    for seed in seeds:
        runs = contenders.by_onednn(seed)
        if runs is not None:
            yield runs, contenders.exact(seed)


def _nearby(contenders: Contenders, seeds: Sequence[int]) -> Iterator[tuple[Runs, Runs]]:
    for seed in seeds:
        runs = contenders.nearby(seed)
        if runs is not None:
            yield runs, contenders.exact(seed)


def _in_float32(contenders: Contenders, seeds: Sequence[int]) -> Iterator[tuple[Runs, Runs]]:
    for seed in seeds:
        runs = contenders.in_float32(seed)
        if runs is not None:
            yield runs, contenders.exact(seed)


def _in_any_round(difference: Difference) -> tuple[str, str]:
    return difference.where.split(": ", 1)[-1], difference.aspect
