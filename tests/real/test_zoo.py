"""Architectures that nobody of this project wrote, against counts of their patterns that somebody else made.

`tests/data/zoo` builds 145 models of transformers, timm and torch.nn, tiny and with random weights. Its counts are by
level of spelling; ours must reach the sum of the levels that are the pattern (an occurrence that is declined because
fusing it would be slower is recognised too), and must not fuse the last level, which is other mathematics.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fuse_pass import Report, coverage
from fuse_pass.report import Reason

ZOO = Path(__file__).parents[1] / "data" / "zoo"
MODES = ("train", "eval")
PATTERN_LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5")
SAMPLE = (
    "bert", "gpt2", "llama", "t5", "vit", "swin", "segformer", "nn.TransformerEncoder-gelu-pre", "nn.Transformer",
)  # fmt: skip


def load_zoo() -> Any:
    specification = importlib.util.spec_from_file_location("zoo", ZOO / "zoo.py")
    assert specification is not None
    assert specification.loader is not None
    zoo = importlib.util.module_from_spec(specification)
    before = list(sys.path)
    specification.loader.exec_module(zoo)
    # The stand-in for torchvision must not hide a real one.
    sys.path[:] = [*before, *(path for path in sys.path if path not in before)]
    return zoo


zoo = load_zoo()


def build(name: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    family = zoo._EXPECTED[name]["family"]
    if family != "nn":
        pytest.importorskip({"hf": "transformers", "timm": "timm"}[family])
    return zoo.build(name)  # type: ignore[no-any-return]


def recognised(report: Report, pattern: str, counts: Callable[[str], bool] = lambda variant: True) -> int:
    """Matches, and candidates that are the pattern but would not gain."""
    matches = [match for match in report.matches if match.pattern == pattern and counts(match.variant)]
    declines = [decline for decline in report.declines if decline.pattern == pattern and decline.reason is Reason.COST]
    return len(matches) + len(declines)


def compare(name: str) -> None:
    model, args, kwargs = build(name)
    for mode in MODES:
        expected = zoo.expected(name, mode)
        if expected is None:
            continue
        model.train(mode == "train")
        torch._dynamo.reset()
        with torch.set_grad_enabled(mode == "train"):
            report = coverage(model, *args, **kwargs)
        pairs = expected["dense_act_dense"]
        others = sum(expected["other_activations"].values())
        wanted = sum(pairs.get(level, 0) for level in PATTERN_LEVELS) + others
        assert recognised(report, "dense_act_dense") == wanted, (mode, pairs, report)
        assert recognised(report, "gated_dense") == expected["gated"], (mode, report)
        norms = expected["dropout_norm"]
        wanted = sum(norms.get(level, 0) for level in PATTERN_LEVELS)
        assert recognised(report, "dropout_norm") >= wanted, (mode, norms, report)
        drops = [m for m in report.matches if m.pattern == "dropout_norm" and "dropout" in m.variant]
        assert len(drops) <= wanted, (mode, norms, report)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_zoo(name: str) -> None:
    compare(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(zoo.names()) - set(SAMPLE)))
def test_the_rest_of_the_zoo(name: str) -> None:
    compare(name)
