"""The report is data first; its table names pattern, place, variant, reason and node."""

from __future__ import annotations

import threading

import torch
from torch import nn

import fuse_pass
from fuse_pass.report import ADVICE, Decline, Match, Reason, Report, publish
from tests.capture import capture

MATCH = Match("dense_act_dense", "gelu", "encoder.0", "model.py:3", "linear_1")
DECLINE = Decline("dropout_norm", Reason.MUTATION, "add_ writes", "encoder.1", "model.py:9", "add_")


def test_counts_read_zero_for_absent_patterns() -> None:
    report = Report([MATCH, MATCH], [DECLINE], graphs=1)
    assert report.counts() == {"dense_act_dense": 2}
    assert report.counts()["dropout_norm"] == 0


def test_table_shows_every_field() -> None:
    text = str(Report([MATCH], [DECLINE], graphs=2))
    assert text.startswith("Fused 1 × dense_act_dense in 2 graphs; declined 1.")
    for part in ("encoder.0", "model.py:3", "gelu", "mutation inside", "add_ writes", "encoder.1", "model.py:9"):
        assert part in text


def test_an_empty_report_says_so() -> None:
    assert str(Report(graphs=1)) == "Fused nothing in 1 graph; declined 0."
    assert "No graph reached fuse_pass" in str(Report())


def test_collect_nests_and_sees_only_its_own_time() -> None:
    with fuse_pass.collect() as outer:
        publish(Report([MATCH], graphs=1))
        with fuse_pass.collect() as inner:
            publish(Report([], [DECLINE], graphs=1))
    publish(Report([MATCH], graphs=1))
    assert (len(outer.matches), len(outer.declines), outer.graphs) == (1, 1, 2)
    assert (len(inner.matches), len(inner.declines), inner.graphs) == (0, 1, 1)


def test_collect_does_not_see_other_threads() -> None:
    with fuse_pass.collect() as report:
        thread = threading.Thread(target=publish, args=(Report([MATCH], graphs=1),))
        thread.start()
        thread.join()
    assert report.graphs == 0


def test_every_reason_has_advice() -> None:
    assert set(ADVICE) == set(Reason)


def test_places_are_module_path_and_source_line() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(4, 12), nn.Linear(12, 4), nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x + self.down(torch.relu(self.up(x))))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Inner(), Inner()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    report = capture(Outer(), torch.randn(3, 4)).report
    assert [(match.pattern, match.where) for match in report.matches] == [
        ("dense_act_dense", "blocks.0"),
        ("dense_act_dense", "blocks.1"),
        ("dropout_norm", "blocks.0"),
        ("dropout_norm", "blocks.1"),
    ]
    assert all(match.source.startswith("test_report.py:") for match in report.matches)
