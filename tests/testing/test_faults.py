"""The fuzzer finds what it looks for: every fault that is put in turns up within a few graphs."""

from __future__ import annotations

import functools

import pytest

from fuse_pass.report import Reason
from fuse_pass.testing.fuzz import Summary, fuzz
from fuse_pass.testing.generate import generate
from fuse_pass.testing.plants import block, dense_act_dense, dropout_norm, spelled
from tests.testing.faults import FAULTS, IGNORED, Fault, ignoring

GRAPHS = 60
ORDINARY = {"tanh for erf", "second output lost", "gradient of the residual missing", "mask of backward is another"}


def first_failure(fault: Fault) -> Summary:
    both = (dropout_norm, spelled, block) if "norm" in fault.op else (dense_act_dense, spelled, block)
    programs = functools.partial(generate, plants=fault.plants or both)
    with fault.installed():
        return fuzz(0, GRAPHS, programs=programs, until=lambda summary: bool(summary.failures))


def test_there_are_enough_and_their_names_are_unique() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30
    assert {fault.name for fault in FAULTS} >= ORDINARY


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, id=f.name, marks=() if f.name in ORDINARY else pytest.mark.slow) for f in FAULTS],
)
def test_every_fault_is_caught(fault: Fault) -> None:
    assert first_failure(fault).failures, f"{fault.name}: not seen in {GRAPHS} graphs"


@pytest.mark.parametrize("fault", [next(f for f in FAULTS if f.name in ORDINARY)], ids=lambda fault: fault.name)
def test_without_the_fault_the_same_graphs_are_right(fault: Fault) -> None:
    failing = first_failure(fault)
    ((seed, _, _),) = failing.failures
    programs = functools.partial(generate, plants=fault.plants)
    assert not fuzz(seed, 1, programs=programs).failures


@pytest.mark.slow
@pytest.mark.parametrize("reason", IGNORED, ids=lambda reason: reason.name)
def test_every_check_is_needed(reason: Reason) -> None:
    """A pass that fuses in spite of a reason to decline is found out."""
    for near_misses in (True, False):
        programs = functools.partial(generate, near_misses=near_misses)
        with ignoring(reason):
            if fuzz(0, 10 * GRAPHS, programs=programs, until=lambda summary: bool(summary.failures)).failures:
                return
    raise AssertionError(f"nothing goes wrong without {reason.name}")
