"""What is aimed at, row by row, as data; and whether a run reached it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fuse_pass.bench.results import COMPILED_ALTERNATIVES, EAGER, OURS, STOCK, Result


def _least_time(result: Result, *names: str) -> float | None:
    return min((result.time_by_ours[name] for name in names if name in result.time_by_ours), default=None)


def _part(values: Mapping[str, float], other: str) -> float | None:
    return values[OURS] / values[other] if OURS in values and values.get(other) else None


def _error_by_fastest(result: Result) -> float | None:
    fastest = min(result.others, key=result.others.__getitem__, default=None)
    return None if fastest is None else result.errors[OURS] / result.errors[fastest]


VS_STOCK, VS_EAGER, VS_BEST, VS_COMPILED = "× torch.compile", "× eager", "× best alternative", "× best torch.compile"
VS_OTHERS, ERROR = "× best contender", "error / that of the fastest contender"
LIMIT, SAVED = "share of the limit", "saved for backward / eager's"
FIRST_CALL, TAKES, SECONDS = "first call / torch.compile's", "time / baseline's", "seconds"

# How a figure is read off a row; None where the row has no such figure.
FIGURES: dict[str, Callable[[Result], float | None]] = {
    VS_STOCK: lambda result: result.time_by_ours.get(STOCK),
    VS_EAGER: lambda result: result.time_by_ours.get(EAGER),
    VS_BEST: lambda result: _least_time(result, EAGER, *COMPILED_ALTERNATIVES),
    VS_COMPILED: lambda result: _least_time(result, *COMPILED_ALTERNATIVES),
    VS_OTHERS: lambda result: min(result.others.values(), default=None),
    ERROR: lambda result: _error_by_fastest(result),
    LIMIT: lambda result: result.share_of_limit,
    SAVED: lambda result: _part(result.saved_bytes, EAGER),
    FIRST_CALL: lambda result: _part(result.first_call_seconds, STOCK),
    TAKES: lambda result: 1 / result.time_by_ours[result.baseline] if result.is_cost else None,
    SECONDS: lambda result: result.seconds[OURS].median,
}


@dataclass(frozen=True)
class Target:
    """One bound on one figure of some rows.

    Attributes:
        rows: a glob of row names.
        figure: a key of `FIGURES`.
        bound: the value to reach.
        at_least: whether more is better.
        instructions: the widest that PyTorch uses where this is aimed at, as a glob, e.g. `AVX512*`.
    """

    rows: str
    figure: str
    bound: float
    at_least: bool = True
    instructions: str = "*"

    @property
    def text(self) -> str:
        return f"{self.figure} {'≥' if self.at_least else '≤'} {self.bound:g}"


@dataclass(frozen=True)
class Outcome:
    """A target and a row that it is about."""

    target: Target
    result: Result
    value: float

    @property
    def is_reached(self) -> bool:
        return self.value >= self.target.bound if self.target.at_least else self.value <= self.target.bound

    @property
    def possible(self) -> float | None:
        """The largest speed-up that the limit of the row leaves; None where the target is no speed-up."""
        result = self.result
        if (
            self.target.figure not in (VS_STOCK, VS_EAGER, VS_BEST, VS_COMPILED, VS_OTHERS)
            or result.share_of_limit is None
        ):
            return None
        return self.value / result.share_of_limit


def _at_least(rows: str, bounds: Mapping[str, float], instructions: str = "*") -> Iterator[Target]:
    return (Target(rows, figure, bound, instructions=instructions) for figure, bound in bounds.items())


def _packed() -> Iterator[Target]:
    """Packed weights, by what others have on the same kind of processor."""
    bounds: dict[str, dict[str, float]] = {
        "AVX2": {"int8/1": 3.1, "int8/16": 4.2, "int8/512": 2.1, "int8/4096": 2.1, "int8_weight_only/1": 2.9,
                 "int4_weight_only/1": 4.7, "int4_weight_only/4": 3, "int4_weight_only/16": 2.8,
                 "b1.58/1": 4, "b1.58/16": 3, "b1.58/512": 1.8},
        "AVX512*": {"int8_weight_only/1": 3, "b1.58/1": 6, "b1.58/16": 4, "b1.58/512": 3},
    }  # fmt: skip
    for instructions, rows in bounds.items():
        for row, bound in rows.items():
            yield from _at_least(f"numbers/packed/{row}", {VS_EAGER: bound}, instructions)
    yield from _at_least("numbers/packed/int8/[0-9]*", {VS_OTHERS: 1.3}, "AVX512*")
    yield from _at_least("numbers/packed/int4_weight_only/[0-9]*", {VS_OTHERS: 1.2}, "AVX512*")
    yield from _at_least("numbers/packed/int8/minilm/*", {VS_OTHERS: 1.2}, "AVX512*")
    yield from _at_least("numbers/packed/int8/minilm/*", {VS_OTHERS: 1}, "AVX2")
    yield Target("numbers/packed/*", ERROR, 1, at_least=False)


TARGETS: tuple[Target, ...] = (
    *_at_least("dropout_norm/8192x768/*/train", {VS_STOCK: 10, VS_EAGER: 4}),
    *_at_least("dense_act_dense/*/fp32/infer", {VS_BEST: 2.1, LIMIT: 0.9}),
    *_at_least("dense_act_dense/*/fp32/train", {VS_BEST: 2}),
    *_at_least("dense_act_dense/*/bf16/infer", {VS_BEST: 1.1, LIMIT: 0.92}),
    *_at_least("dense_act_dense/*/bf16/train", {VS_BEST: 1.05, LIMIT: 0.92}),
    Target("dense_act_dense/*/train", SAVED, 0.6, at_least=False),
    *_at_least("bert/fp32/infer", {VS_BEST: 2}),
    *_at_least("bert/fp32/train", {VS_BEST: 1.6}),
    *_at_least("bert/bf16-autocast/train", {VS_BEST: 1.2}),
    *_at_least("gpt2/fp32/*", {VS_BEST: 1.5}),
    *_at_least("gpt2/bf16-autocast/train", {VS_BEST: 1.1}),
    *_at_least("vit/fp32/*", {VS_BEST: 1.5}),
    *_at_least("vit/bf16-autocast/train", {VS_BEST: 1.1}),
    *_at_least("models/*", {VS_COMPILED: 0.97}),
    *_at_least("tiny/*", {VS_COMPILED: 0.97}),
    *_at_least("mlp/*", {VS_OTHERS: 1}),
    *_at_least("minilm/*", {VS_OTHERS: 1}),
    *_at_least("vit_1/*", {VS_OTHERS: 1}),
    *_packed(),
    Target("*", FIRST_CALL, 1.1, at_least=False),
    Target("numbers/fake_quantize/fp8_*/nearest", TAKES, 1.5, at_least=False),
    Target("numbers/fake_quantize/bf16/nearest", TAKES, 1.5, at_least=False),
    Target("numbers/training/*", TAKES, 1.3, at_least=False),
    Target("pass/*", SECONDS, 5, at_least=False),
    Target("pass/*", TAKES, 1.2, at_least=False),
)


def outcomes(results: list[Result], instructions: str = "") -> Iterator[list[Outcome]]:
    """For every target the measured rows that it is about, furthest from it first; targets without any are left out.

    Args:
        results: the rows.
        instructions: the widest that PyTorch used. Targets for other processors are left out.
    """
    for target in TARGETS:
        if not fnmatch.fnmatchcase(instructions, target.instructions):
            continue
        found = [
            Outcome(target, result, value)
            for result in results
            if fnmatch.fnmatchcase(result.name, target.rows) and (value := FIGURES[target.figure](result)) is not None
        ]
        if found:
            yield sorted(found, key=lambda outcome: outcome.value, reverse=not target.at_least)
