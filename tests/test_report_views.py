"""What a report looks like: rows of layers that repeat, plain data, notebooks and a page by itself."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import fuse_pass
from fuse_pass.report import ADVICE, Decline, Match, Note, Reason, Report
from fuse_pass.report_groups import grouped, joined

DECLINE = Decline("dropout_norm", Reason.MUTATION, "add_ writes <into> x", "encoder.1", "model.py:9", "add_")


def match(where: str, variant: str = "gelu", source: str = "model.py:3") -> Match:
    return Match("dense_act_dense", variant, where, source, "linear_1")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], "a.{0..2}.b"),
        (["a.0", "a.2", "a.3", "a.5"], "a.{0, 2..3, 5}"),
        (["a.10", "a.9"], "a.{9..10}"),
        (["a.0.1", "a.1.1"], "a.{0..1}.1"),
        (["a.0.1", "a.1.0"], "a.{0..1}.{0..1}"),
        (["a.3"], "a.3"),
        ([""], ""),
        (["layer1.x"], "layer1.x"),
    ],
)
def test_paths_that_differ_in_numbers_are_joined(paths: list[str], expected: str) -> None:
    assert joined(paths) == expected


def test_only_what_says_the_same_is_one_row() -> None:
    rows = [
        ("h.0", ("dense", "model.py:3"), ("linear has another reader", "add")),
        ("h.1", ("dense", "model.py:3"), ("linear_12 has another reader", "add_7")),
        ("h.2", ("dense", "model.py:3"), ("is too small", "add_9")),
        ("h1.2", ("dense", "model.py:3"), ("is too small", "add_9")),  # a number inside a name is part of the name
        ("h.3", ("dense", "model.py:4"), ("is too small", "add_9")),
    ]
    found = [(group.where, group.times, group.cells) for group in grouped(rows)]
    assert found == [
        ("h.{0..1}", 2, ("dense", "model.py:3", "linear has another reader", "add")),
        ("h.2", 1, ("dense", "model.py:3", "is too small", "add_9")),
        ("h1.2", 1, ("dense", "model.py:3", "is too small", "add_9")),
        ("h.3", 1, ("dense", "model.py:4", "is too small", "add_9")),
    ]


def test_layers_that_repeat_share_a_row_of_the_table() -> None:
    text = str(Report([match(f"layer.{i}") for i in range(12)] + [match("head")], [DECLINE], graphs=1))
    assert "layer.{0..11}" in text
    (row,) = [line for line in text.splitlines() if "{0..11}" in line]
    assert row.split() == ["dense_act_dense", "layer.{0..11}", "12", "model.py:3", "gelu"]
    assert "times" not in str(Report([match("layer.0"), match("head")], graphs=1))


def test_other_variants_or_sources_are_rows_of_their_own() -> None:
    report = Report([match("layer.0"), match("layer.1", "relu"), match("layer.2", source="model.py:7")], graphs=1)
    assert "{" not in str(report)


def test_plain_data_is_all_there_is(tmp_path: Path) -> None:
    report = Report([match("layer.0")], [DECLINE], graphs=2, notes=[Note(Reason.REUSED, "Nothing new.")])
    report.save(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == report.to_dict()
    assert found["graphs"] == 2
    assert found["matches"] == [
        {
            "pattern": "dense_act_dense",
            "variant": "gelu",
            "where": "layer.0",
            "source": "model.py:3",
            "node": "linear_1",
        }
    ]
    assert found["declines"][0]["reason"] == "mutation inside"
    assert found["declines"][0]["advice"] == ADVICE[Reason.MUTATION]
    assert found["notes"] == [{"reason": "compiled before", "detail": "Nothing new.", "advice": ADVICE[Reason.REUSED]}]


class Checked(HTMLParser):
    """That what is opened is closed, and the text that is shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.shown: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def test_the_page_shows_the_model_as_a_tree_and_needs_nothing_else(tmp_path: Path) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
    report = fuse_pass.coverage(model, torch.randn(2, 3, 16))
    report.declines.append(DECLINE)
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Checked(text)
    shown = " ".join(page.shown)
    for part in ("layers", "3 fused", "6 fused", "1 declined", "add_ writes <into> x", ADVICE[Reason.MUTATION]):
        assert part in shown, part
    assert "<into>" not in text, "what a report says is text, and no HTML"
    assert "src=" not in text
    assert "http" not in text


def test_notebooks_show_tables() -> None:
    text = Report([match("layer.0")], [DECLINE], graphs=1, notes=[Note(Reason.REUSED, "a < b")])._repr_html_()
    assert {"layer.0", "gelu", "mutation inside", "model.py:9"} <= {part.strip() for part in Checked(text).shown}
    assert "a &lt; b" in text
    Checked(Report()._repr_html_())


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ending in .html or .json, got .*report.txt"):
        Report().save(tmp_path / "report.txt")
    assert not list(tmp_path.iterdir())
