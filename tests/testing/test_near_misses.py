"""Every reason to decline turns up among the near misses, and none of them is computed wrongly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from fuse_pass.report import Reason
from fuse_pass.testing import near_misses, surroundings
from fuse_pass.testing.builder import Builder
from fuse_pass.testing.fuzz import Summary, fuzz
from fuse_pass.testing.generate import generate

GRAPHS = 12
# Not of a pattern: `convert` and `calibrate` report these.
OF_LAYERS = {Reason.OVERLAP, Reason.NO_QUANTIZED_LAYER, Reason.EXCLUDED, Reason.DYNAMIC_SCALE}
# Of a whole graph, or of code that never was one: reports note these.
OF_COMPILATION = {
    Reason.SPLIT, Reason.OTHER_BACKEND, Reason.SWITCHED_OFF, Reason.RECOMPILE_LIMIT, Reason.REUSED, Reason.GRAPH_BREAK,
    Reason.NOT_COMPILED, Reason.NOT_CAPTURED,
}  # fmt: skip
PRODUCED_BY: dict[Reason, Callable[[Builder], Any]] = {
    Reason.SECOND_READER: near_misses.interior_read_again,
    Reason.MUTATION: near_misses.written_between,
    Reason.AUTOCAST: surroundings.region_inside,
    Reason.GRAD_MODE: surroundings.switched_inside,
    Reason.CONSTANTS: near_misses.almost_a_norm,
    Reason.SUBCLASS: surroundings.jagged,
    Reason.DTYPES: near_misses.mixed_dtypes,
    Reason.DEVICES: surroundings.on_another_device,
    Reason.LAYOUT: near_misses.almost_a_norm,
    Reason.BROADCAST: surroundings.broadcast,
    Reason.FALLBACK_RANDOM: surroundings.for_eager_s_random_numbers,
    Reason.FUNCTORCH: surroundings.transformed,
    Reason.HIGHER_ORDER: surroundings.in_a_body,
    Reason.ORDER: surroundings.parameter_from_the_sum,
    Reason.NO_SECOND_LINEAR: near_misses.almost_an_activation,
    Reason.COST: surroundings.columns_normed,
    Reason.OPAQUE: surroundings.hidden_in_a_layer,
    Reason.QUANTIZATION: surroundings.quantized_inside,
}


def test_no_reason_is_left_out() -> None:
    assert PRODUCED_BY.keys() | OF_LAYERS | OF_COMPILATION == set(Reason)
    assert set(PRODUCED_BY.values()) <= {*near_misses.NEAR_MISSES, *surroundings.SURROUNDINGS}


@pytest.mark.parametrize("reason", PRODUCED_BY, ids=lambda reason: reason.name)
def test_every_reason_is_seen(reason: Reason) -> None:
    programs = functools.partial(generate, near_misses=True, plants=(PRODUCED_BY[reason],))

    def seen(summary: Summary) -> bool:
        return bool(summary.failures) or summary.declines[str(reason)] > 0

    summary = fuzz(0, 5 * GRAPHS, programs=programs, until=seen)
    assert not summary.failures, str(summary)
    assert summary.declines[str(reason)] > 0, str(summary)


@pytest.mark.slow
@pytest.mark.parametrize("plant", dict.fromkeys(surroundings.SURROUNDINGS), ids=lambda plant: plant.__name__)
def test_no_surroundings_mislead(plant: Callable[[Builder], Any]) -> None:
    summary = fuzz(100, 5 * GRAPHS, programs=functools.partial(generate, near_misses=True, plants=(plant,)))
    assert not summary.failures, "\n".join(f"seed {seed}: {verdict}" for seed, _, verdict in summary.failures)
