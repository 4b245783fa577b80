"""What a report says where code reached fuse_pass in pieces or not at all: each cause in words of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch.fx import GraphModule

import fuse_pass
from fuse_pass.backend import FuseBackend
from fuse_pass.report import ADVICE, Reason, Report, publish

X = torch.randn(3, 8)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))


def rewrite_only(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
    """Our backend without Inductor."""
    fused, report = FuseBackend(strict=True).rewrite(gm)
    publish(report)
    return fused.forward


def reasons_of(report: Report) -> list[Reason]:
    assert all(ADVICE[note.reason] in str(report) for note in report.notes)
    return [note.reason for note in report.notes]


def test_a_graph_that_is_cut_for_ddp() -> None:
    """Every cut is between two layers; buckets of 200 bytes hold one each."""

    def split(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        optimizer = DDPOptimizer(200, rewrite_only, first_bucket_cap=200)
        return optimizer.compile_fn(gm, example_inputs)

    model = nn.Sequential(block(), nn.GELU(), block())
    with fuse_pass.collect() as report:
        y = torch.compile(model, backend=split)(X)
    torch.testing.assert_close(y, model(X))
    assert report.graphs > 1
    assert reasons_of(report) == [Reason.SPLIT]
    assert {decline.reason for decline in report.declines} == {Reason.SPLIT}
    assert "optimize_ddp = False" in str(report)


def test_a_graph_that_is_not_cut_has_no_notes() -> None:
    with fuse_pass.collect() as report:
        torch.compile(block(), backend=rewrite_only)(X)
    assert report.counts() == {"dense_act_dense": 1}
    assert report.notes == []


def test_a_block_that_an_outer_compilation_takes_in() -> None:
    inner = torch.compile(block(), backend=rewrite_only)
    outer = torch.compile(lambda x: inner(x) * 2, backend="eager")
    with fuse_pass.collect() as report:
        outer(X)
    assert report.graphs == 0
    assert reasons_of(report) == [Reason.OTHER_BACKEND]


def test_code_that_was_compiled_before() -> None:
    compiled = torch.compile(block(), backend=rewrite_only)
    compiled(X)
    with fuse_pass.collect() as report:
        compiled(X)
    assert report.graphs == 0
    assert reasons_of(report) == [Reason.REUSED]


def test_compilation_that_is_switched_off() -> None:
    compiled = torch.compile(block(), backend=rewrite_only)
    switches: list[tuple[str, Any]] = [
        ("force_eager", torch.compiler.set_stance("force_eager")),
        ("TORCHDYNAMO_DISABLE", mock.patch.dict(os.environ, {"TORCHDYNAMO_DISABLE": "1"})),
        ("config.disable", torch._dynamo.config.patch(disable=True)),
    ]
    for name, switch in switches:
        with switch, fuse_pass.collect() as report:
            (torch.compile(block(), backend=rewrite_only) if "DYNAMO" in name else compiled)(X)
        assert report.graphs == 0
        assert reasons_of(report) == [Reason.SWITCHED_OFF]
        assert name in report.notes[0].detail


def test_functions_that_are_kept_from_compilation() -> None:
    kept = torch.compiler.disable(block())

    def model(x: Tensor) -> Tensor:
        return kept(x) + 1  # type: ignore[no-any-return]

    report = fuse_pass.coverage(model, X)
    assert report.counts() == {}
    assert reasons_of(report) == [Reason.SWITCHED_OFF]
    with fuse_pass.collect() as collected:
        torch.compile(model, backend=rewrite_only)(X)
    assert reasons_of(collected) == [Reason.SWITCHED_OFF]
    assert "torch.compiler.disable" in str(collected)


def test_more_shapes_than_dynamo_compiles() -> None:
    compiled = torch.compile(block(), backend=rewrite_only, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), fuse_pass.collect() as report:
        for rows in (2, 3, 4):
            compiled(torch.randn(rows, 8))
    assert report.counts() == {"dense_act_dense": 2}
    assert reasons_of(report) == [Reason.RECOMPILE_LIMIT]


def test_nothing_that_was_called() -> None:
    with mock.patch("fuse_pass.report._EVER_PUBLISHED", []), fuse_pass.collect() as report:
        pass
    assert report.notes == []
    assert "No graph reached fuse_pass: nothing was compiled" in str(report)


def test_notes_are_merged_once() -> None:
    note = fuse_pass.report.Note(Reason.SPLIT, "cut")
    report = Report(notes=[note])
    report.extend(Report(notes=[note]))
    assert report.notes == [note]
