"""Faults that are not in an op or in the pass: each is put in, and a check has to find it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fuse_pass import FuseBackend
from fuse_pass.gemm import machine, measured
from fuse_pass.numerics import random_bits
from fuse_pass.ops.dropout_norm import Settings as NormSettings
from fuse_pass.testing.builder import Builder
from fuse_pass.testing.fuzz import fuzz
from fuse_pass.testing.generate import generate
from fuse_pass.testing.plants import dense_act_dense, dropout_norm
from fuse_pass.testing.program import Program, Settings
from fuse_pass.testing.sources import ROWS


@dataclass(frozen=True)
class OtherFault:
    """Something that is missing in the package.

    Attributes:
        name: what.
        without: names of functions, and what stands in their place.
        check: raises AssertionError where something is wrong.
        marks: of its tests.
    """

    name: str
    without: dict[str, Callable[..., Any]]
    check: Callable[[], None]
    marks: tuple[pytest.MarkDecorator, ...] = ()

    @contextlib.contextmanager
    def installed(self) -> Any:
        with contextlib.ExitStack() as stack:
            for target, replacement in self.without.items():
                stack.enter_context(mock.patch(target, replacement))
            yield


def trained_on_a_small_budget(seed: int) -> Program:
    program = generate(seed, plants=(dropout_norm, dense_act_dense))
    return replace(program, settings=replace(program.settings, budget=0.5, training=True, grad=True))


def gradients_are_right_on_a_small_budget() -> None:
    summary = fuzz(0, 12, programs=trained_on_a_small_budget, until=lambda summary: bool(summary.failures))
    assert not summary.failures, str(summary)


def variance_as_a_difference(
    settings: NormSettings, z: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The corrected two-pass algorithm, `mean((x - m)²) - mean(x - m)²`, which rounding can take below -eps."""
    dtype = settings.dtype_of(z)
    wide, size = z.to(dtype).to(torch.promote_types(dtype, torch.float32)), z.shape[-1]
    estimate = wide.sum(-1, keepdim=True) * (1 / size)
    wide = wide - estimate
    error = wide.sum(-1, keepdim=True) * (1 / size)
    rstd = torch.rsqrt((wide * wide).sum(-1, keepdim=True) * (1 / size) - error * error + settings.eps)
    y = (wide - error) * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(dtype).contiguous(), torch.stack((estimate + error, rstd))


def sum_and_norm(b: Builder) -> None:
    """Leaves constant rows constant; the eps is that of BERT."""
    x, n = b.values[0].name, b.values[0].width
    b.emit(f"F.layer_norm({x} + {x}, ({n},), {b.parameter(n)}, None, 1e-12)", b.values[0].shape)


def of_constant_rows(seed: int) -> Program:
    b = Builder(Random(seed), [(*ROWS, 1000)], lambda builder: None)
    sum_and_norm(b)
    return b.program(Settings(seed=seed, rows="constant"), ROWS[0])


def constant_rows_are_right() -> None:
    summary = fuzz(0, 8, programs=of_constant_rows, until=lambda summary: bool(summary.failures))
    assert not summary.failures, str(summary)


def seeds_keep_different_numbers_of_elements() -> None:
    """With a count of elements that is a power of two, where an exchange of them by their bits stays among them."""
    kept = {int(random_bits.keep_mask(torch.tensor(seed), 64, 64, 0.5).sum()) for seed in range(32)}
    assert len(kept) > 8


def a_table_is_of_one_processor() -> None:
    """Of the same name as another, which lacks some of its instructions."""
    here = measured.cache_file()
    info = {**machine._cpu_info(), "flags": "fpu sse4_2 avx avx2 fma", "Features": "asimd"}
    machine.processor.cache_clear()
    try:
        with mock.patch.object(machine, "_cpu_info", return_value=info):
            there = measured.cache_file()
    finally:
        machine.processor.cache_clear()
    assert here != there


def past_the_recompile_limit_nothing_is_unquantized() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=FuseBackend(quantize="int4"), dynamic=False)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for rows in (2, 3):
            x = torch.randn(rows, 8)
            try:
                y = compiled(x)
            except RuntimeError:  # which is as good
                continue
            assert not torch.allclose(y, model(x), rtol=1e-6, atol=1e-6), "computed in float32"


OTHER_FAULTS: tuple[OtherFault, ...] = (
    OtherFault(
        "a variance that is a difference",
        {"fuse_pass.ops.dropout_norm.Settings.normalised": variance_as_a_difference},
        constant_rows_are_right,
        (pytest.mark.slow,),
    ),
    OtherFault(
        "a seed is computed again in backward",
        {"fuse_pass.inductor.compat.keep_for_backward": lambda node: None},
        gradients_are_right_on_a_small_budget,
        (pytest.mark.slow,),
    ),
    OtherFault(
        "the low half of a seed is not mixed",
        {"fuse_pass.numerics.random_bits._mixed": torch.zeros_like},
        seeds_keep_different_numbers_of_elements,
    ),
    OtherFault(
        "the file of GEMM measurements does not know the instructions",
        {"fuse_pass.gemm.measured.processor": machine.cpu_name},
        a_table_is_of_one_processor,
    ),
    OtherFault(
        "nobody watches the calls of a quantised model",
        {"fuse_pass.backend.FuseBackend.call_context": lambda self, options: None},
        past_the_recompile_limit_nothing_is_unquantized,
    ),
)

parametrized = pytest.mark.parametrize("fault", [pytest.param(f, id=f.name, marks=f.marks) for f in OTHER_FAULTS])


@parametrized
def test_is_found(fault: OtherFault) -> None:
    with fault.installed(), pytest.raises(AssertionError):
        fault.check()


@parametrized
def test_without_the_fault_all_is_well(fault: OtherFault) -> None:
    fault.check()
