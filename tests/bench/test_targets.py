"""Targets are data: read off rows, reached or not, and what a machine's limit leaves."""

from __future__ import annotations

import fnmatch

import pytest

from fuse_pass.bench import command, targets
from fuse_pass.bench.results import Result
from fuse_pass.bench.targets import FIGURES, TARGETS, Outcome, Target, outcomes
from tests.bench import sample

RESULTS = {result.name: result for result in sample.run().results}
TRAIN, INFER, TINY, COST = RESULTS.values()


@pytest.mark.parametrize(
    ("figure", "result", "value"),
    [
        (targets.VS_STOCK, TRAIN, 16),
        (targets.VS_EAGER, TRAIN, 8),
        (targets.VS_BEST, TRAIN, 8),
        (targets.VS_COMPILED, TRAIN, 16),
        (targets.VS_BEST, INFER, 25 / 24),
        (targets.VS_COMPILED, TINY, 0.9),
        (targets.LIMIT, TRAIN, 0.8),
        (targets.LIMIT, INFER, 0.9),
        (targets.LIMIT, TINY, None),
        (targets.SAVED, TRAIN, 0.5),
        (targets.SAVED, INFER, None),
        (targets.FIRST_CALL, INFER, 1.5),
        (targets.FIRST_CALL, COST, None),
        (targets.TAKES, COST, 1.2),
        (targets.TAKES, TRAIN, None),
        (targets.VS_STOCK, COST, None),
        (targets.VS_BEST, COST, None),
        (targets.SECONDS, COST, 0.0009),
    ],
)
def test_figures(figure: str, result: Result, value: float | None) -> None:
    assert FIGURES[figure](result) == (None if value is None else pytest.approx(value))


def test_reached_is_on_the_right_side_of_the_bound() -> None:
    assert Outcome(Target("*", targets.VS_STOCK, 10), TRAIN, 10.0).is_reached
    assert not Outcome(Target("*", targets.VS_STOCK, 10), TRAIN, 9.9).is_reached
    assert Outcome(Target("*", targets.TAKES, 1.5, at_least=False), COST, 1.5).is_reached
    assert not Outcome(Target("*", targets.TAKES, 1.5, at_least=False), COST, 1.6).is_reached


def test_the_limit_says_what_is_possible() -> None:
    assert Outcome(Target("*", targets.VS_STOCK, 10), TRAIN, 16.0).possible == pytest.approx(20), "160 ms against 8"
    assert Outcome(Target("*", targets.VS_STOCK, 10), TINY, 0.9).possible is None
    assert Outcome(Target("*", targets.LIMIT, 0.9), TRAIN, 0.8).possible is None


def test_every_target_is_about_rows_that_exist() -> None:
    names = [line.name for line in command.LINES]
    for target in TARGETS:
        assert target.figure in FIGURES
        assert fnmatch.filter(names, target.rows), target.rows


def test_the_row_furthest_from_a_target_comes_first() -> None:
    judged = {(found[0].target.rows, found[0].target.figure): found for found in outcomes(list(RESULTS.values()))}
    first_calls = judged["*", targets.FIRST_CALL]
    assert [outcome.value for outcome in first_calls] == [1.5, 1.05, 1.0]
    assert [outcome.is_reached for outcome in first_calls] == [False, True, True]
    assert ("gpt2/fp32/*", targets.VS_BEST) not in judged, "nothing of it was measured"
    results = [TINY, sample.row("tiny/other", sample.spreads(eager=1, stock=0.5, ours=1))]
    (compiled,) = (found for found in outcomes(results) if found[0].target.figure == targets.VS_COMPILED)
    assert [outcome.value for outcome in compiled] == pytest.approx([0.5, 0.9])
