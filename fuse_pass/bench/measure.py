"""Measures a row of `bench`: whole calls, packed weights, costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuse_pass.backend import FuseBackend
from fuse_pass.bench import results, roofline
from fuse_pass.bench.against import accuracy
from fuse_pass.bench.against.apart import measured_apart
from fuse_pass.bench.against.contender import Contender, Task, under_no_grad
from fuse_pass.bench.against.entries import Entries, entries, nothing_for
from fuse_pass.bench.against.tasks import float_task, packed_task
from fuse_pass.bench.contenders import contenders, own_function, tensors_of
from fuse_pass.bench.numbers import Cost
from fuse_pass.bench.packed import PackedRow
from fuse_pass.bench.results import EAGER, OURS, STOCK, Result
from fuse_pass.bench.rows import Row
from fuse_pass.commands import timing
from fuse_pass.commands.errors import CommandError
from fuse_pass.report import collect


@dataclass(frozen=True)
class Settings:
    """How rows are measured: on which device and how many threads, for how long, against whom besides; where the words
    go that say how far it is."""

    device: str
    threads: int
    seconds: float
    against: Sequence[Contender]
    say: Callable[[str], None]


def compared(row: Row, rate: float, settings: Settings) -> Result:
    """A model called by eager PyTorch, torch.compile and fuse_pass; rate: FLOP/s of its products."""
    found = contenders(row, settings.device, lambda word: settings.say(f"{word}, "))
    eager = found.steps[EAGER]
    calls: dict[str, Callable[[], Any]] = dict(found.steps)
    others = Others()
    if settings.against:
        results_of = {name: step.forward for name, step in found.steps.items()}
        others = _others(lambda: float_task(row, eager.example, settings.threads), results_of, settings)
    with timing.pinned(settings.threads):
        limit = roofline.limit(eager, rate, settings.device)
        samples = timing.alternate({**calls, **others.calls}, settings.seconds, again=bool(settings.against))
    result = Result(
        row.name,
        row.train,
        **_fields(row.name, samples, others, settings),
        limit_seconds=limit.seconds if limit.is_meaningful else None,
        limited_by=limit.by if limit.is_meaningful else None,
        saved_bytes={name: step.saved_bytes() for name, step in found.steps.items()} if row.train else {},
        first_call_seconds=found.first_call_seconds,
        fused=dict(found.report.counts()),
        declined=len(found.report.declines),
    )
    settings.say(f"{result.time_by_ours[STOCK]:.2f}× torch.compile\n")
    return result


def packed(row: PackedRow, settings: Settings) -> Result:
    """A model with packed weights, compiled by us, against its float model in eager PyTorch."""
    models = row.models(settings.device)
    example = models.plain
    ours = torch.compile(own_function(models.packed), backend=FuseBackend())
    calls = {OURS: under_no_grad(ours, example), EAGER: under_no_grad(example.model, example)}
    with collect() as report:
        calls[OURS]()
    others = Others()
    if settings.against:
        others = _others(lambda: packed_task(row, example, settings.threads), calls, settings)
    with timing.pinned(settings.threads):
        samples = timing.alternate({**calls, **others.calls}, settings.seconds, again=True)
    fields = _fields(row.name, samples, others, settings)
    result = Result(row.name, False, **fields, fused=dict(report.counts()), declined=len(report.declines))
    settings.say(f"{result.time_by_ours[EAGER]:.2f}× eager\n")
    return result


def priced(cost: Cost, settings: Settings) -> Result:
    """What something costs, against its baseline."""
    ours, baseline = cost.build(settings.device)
    calls: Mapping[str, Callable[[], object]] = {OURS: ours, cost.baseline: baseline}
    for call in calls.values():
        call()
    with timing.pinned(settings.threads):
        samples = timing.alternate(calls, settings.seconds, cost.rounds)
    result = Result(cost.name, train=False, **results.timed(samples))
    settings.say(f"takes {1 / result.time_by_ours[cost.baseline]:.2f}× {cost.baseline}\n")
    return result


@dataclass(frozen=True)
class Others(Entries):
    """Who takes part by `--against`; attributes of `Entries`, and those that get a process of their own."""

    apart: tuple[str, ...] = ()


def _others(task: Callable[[], Task], calls: Mapping[str, Callable[[], Any]], settings: Settings) -> Others:
    try:
        asked = task()
    except CommandError as error:  # a row that is about something else than inference
        return Others(absent={contender.name: str(error) for contender in settings.against})
    truth = accuracy.in_float64(asked)
    here = [contender for contender in settings.against if not contender.is_apart]
    with timing.pinned(settings.threads):
        found = entries(here, asked, truth, lambda word: settings.say(f"{word}, "))
    own = {who: _error(calls[who], truth) for who in (EAGER, OURS)}
    elsewhere = [contender for contender in settings.against if contender.is_apart]
    absent = {one.name: nothing_for(asked.kind) for one in elsewhere if asked.kind not in one.build}
    apart = tuple(one.name for one in elsewhere if one.name not in absent)
    return Others(found.calls, own | found.errors, found.absent | absent, apart)


def _error(call: Callable[[], Any], truth: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return accuracy.relative_error(tensors_of(call()), truth)


def _fields(row: str, samples: Mapping[str, list[float]], others: Others, settings: Settings) -> dict[str, Any]:
    """The fields of a `Result`: what was measured here, and in other processes."""
    fields = results.timed(samples) | {"errors": others.errors, "absent": others.absent, "eager_apart": {}}
    for name in others.apart:
        try:
            found = measured_apart(name, row, settings.threads, settings.seconds)
        except CommandError as error:
            others.absent[name] = str(error)
            settings.say(f"{name} not ({error}), ")
            continue
        there = found.samples
        fields["seconds"][name] = results.spread(there[name])
        fields["eager_apart"][name] = results.spread(there[EAGER]).median
        by_eager = timing.ratio(there, name, EAGER)
        fields["time_by_ours"][name] = by_eager * fields["time_by_ours"][EAGER]
        fields["errors"][name] = found.error
    return fields
