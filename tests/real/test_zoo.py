"""Architectures that nobody of this project wrote, against counts of their patterns that somebody else made.

`tests/data/zoo` builds 145 models of transformers, timm and torch.nn, tiny and with random weights. Its counts are by
level of spelling; ours must reach the sum of the levels that are the pattern (an occurrence that is declined because
fusing it would be slower is recognised too), and must not fuse the last level, which is other mathematics.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fuse_pass import Report, coverage
from fuse_pass.report import Reason
from tests.real.zoo_models import build, zoo

MODES = ("train", "eval")
PATTERN_LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5")
SAMPLE = (
    "bert", "gpt2", "llama", "t5", "vit", "swin", "segformer", "nn.TransformerEncoder-gelu-pre", "nn.Transformer",
)  # fmt: skip


# What is counted and not recognised, or recognised and not counted, with the reason.
MISSED_NORMS = {
    "udop": 1,  # `inputs_embeds += …` writes into what others read
}
OTHER_ACTIVATIONS_MISSED = {
    "caformer_s18": "a learned scale and shift after the square",
    "efficientvim_m1": "BatchNorm between the convolutions",
    "halonet26t": "BatchNorm between the convolutions",
    "mobilevitv2_050": "BatchNorm between the convolutions",
    "nomic_bert": "a norm between the Linear layers",
    "qwen3_next": "a product with another tensor between the Linear layers",
    "rwkv": "sigmoid gates a third product",
}


def matches(report: Report, pattern: str, word: str = "") -> int:
    return sum(match.pattern == pattern and word in match.variant for match in report.matches)


def not_worth_it(report: Report, pattern: str) -> int:
    return sum(decline.pattern == pattern and decline.reason is Reason.COST for decline in report.declines)


def of_the_pattern(counts: dict[str, int]) -> int:
    return sum(counts.get(level, 0) for level in PATTERN_LEVELS)


def assert_recognised(name: str) -> None:
    model, args, kwargs = build(name)
    for mode in MODES:
        expected = zoo.expected(name, mode)
        if expected is None:  # the counter saw several graphs
            continue
        model.train(mode == "train")
        torch._dynamo.reset()
        with torch.set_grad_enabled(mode == "train"):
            report = coverage(model, *args, **kwargs)
        assert_products_recognised(name, expected, report)
        norms = of_the_pattern(expected["dropout_norm"])
        found = matches(report, "dropout_norm") + not_worth_it(report, "dropout_norm")
        missed = MISSED_NORMS.get(name, 0)
        assert found >= norms - missed, (mode, expected, report)
        # Sums without a dropout are fused too and not counted; a dropout beyond the last level never is.
        assert matches(report, "dropout_norm", "dropout") <= norms, (mode, expected, report)


def assert_products_recognised(name: str, expected: dict[str, Any], report: Report) -> None:
    pairs, others = of_the_pattern(expected["dense_act_dense"]), sum(expected["other_activations"].values())
    gelus = matches(report, "dense_act_dense", "gelu")
    declined = not_worth_it(report, "dense_act_dense")
    assert gelus <= pairs <= gelus + declined, (expected, report)
    if name not in OTHER_ACTIVATIONS_MISSED:
        assert matches(report, "dense_act_dense") + declined >= pairs + others, (expected, report)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_zoo(name: str) -> None:
    assert_recognised(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(zoo.names()) - set(SAMPLE)))
def test_the_rest_of_the_zoo(name: str) -> None:
    assert_recognised(name)
