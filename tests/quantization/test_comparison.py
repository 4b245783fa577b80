"""`fuse_pass.compare`: figures against their definitions, and models that are left as they were."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_pass
from fuse_pass import compare, convert, pack
from fuse_pass.quantization.comparison import Difference


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.up, self.down = nn.Embedding(20, 32), nn.Linear(32, 64), nn.Linear(64, 10)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        h = torch.relu(self.up(self.embedding(tokens)))
        return {"logits": self.down(self.dropout(h)), "hidden": h, "tokens": tokens}


BATCHES = [torch.arange(12).view(3, 4), torch.arange(8, 20).view(3, 4)]


def snr(expected: Tensor, found: Tensor) -> float:
    noise = (found.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise))


@pytest.mark.parametrize("how", ["pack", "convert"])
def test_figures_are_what_they_say(how: str) -> None:
    model = Model()
    other: Any = pack(model, "int8") if how == "pack" else convert(model, "int4", include=["embedding", "up", "down"])
    comparison = compare(model, other, BATCHES)
    assert [layer.name for layer in comparison.layers] == ["embedding", "up", "down"]
    assert comparison.batches == 2
    model.eval(), other.eval()
    with torch.no_grad():
        tokens = torch.cat(BATCHES)
        if how == "convert":  # scales of whole tensors, which are those of each batch
            expected, found = ([net(batch)["logits"] for batch in BATCHES] for net in (model, other))
            expected_up = [model.up(model.embedding(batch)) for batch in BATCHES]
            found_up = [other.up(model.embedding(batch)) for batch in BATCHES]
            logits, others, up, other_up = (torch.cat(part) for part in (expected, found, expected_up, found_up))
        else:
            logits, others = model(tokens)["logits"], other(tokens)["logits"]
            up, other_up = model.up(model.embedding(tokens)), other.up(model.embedding(tokens))
    assert comparison.layers[1].alone.snr == pytest.approx(snr(up, other_up), abs=1e-3)
    assert comparison.layers[1].alone.largest == pytest.approx(float((up - other_up).abs().max()), rel=1e-5)
    assert comparison.layers[2].so_far.snr == pytest.approx(snr(logits, others), abs=1e-3)
    assert comparison.layers[0].alone == comparison.layers[0].so_far
    assert comparison.top1 == pytest.approx(float((logits.argmax(-1) == others.argmax(-1)).float().mean()))
    assert comparison.worst()[0].alone.snr == min(layer.alone.snr for layer in comparison.layers)


def test_the_same_model_differs_in_nothing() -> None:
    model = Model()
    comparison = compare(model, model, BATCHES)
    assert comparison.layers == []
    assert comparison.outputs.snr == math.inf
    assert comparison.outputs.largest == 0
    assert comparison.top1 == 1
    assert (
        str(comparison)
        == "Results: inf dB, largest error 0.00e+00, the same largest element in 100.0% of rows; 2 batches."
    )


def test_the_table_names_the_worst_layer_first() -> None:
    model = Model()
    with torch.no_grad():
        # One large weight, whose input is 0: int4 with one scale cannot tell the others apart.
        model.down.weight[:, 0], model.up.weight[0], model.up.bias[0] = 100, 0, -1
    text = str(compare(model, pack(model, "int4_weight_only"), BATCHES))
    lines = text.splitlines()
    assert "alone (dB)" in lines[2]
    assert lines[4].startswith("down")
    assert "Linear → PackedLinear" in lines[4]


def test_models_are_left_as_they_were() -> None:
    model = Model().train()
    packed = pack(model, "int8")
    packed.up.eval()
    compare(model, packed, BATCHES)
    assert model.training
    assert packed.training
    assert not packed.up.training
    assert not any(fuse_pass.inductor.private.has_hooks(module) for net in (model, packed) for module in net.modules())


def test_compiled_models_are_compared_as_what_was_compiled() -> None:
    model = Model()
    packed = pack(model, "int8")
    expected = compare(model, packed, BATCHES)
    assert compare(torch.compile(model), torch.compile(packed), BATCHES) == expected


def test_layers_that_are_used_twice_and_models_that_are_layers() -> None:
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    packed = pack(model, "int8")
    x = torch.randn(4, 16)
    comparison = compare(model, packed, [(x,), {"input": x}])
    assert [found.name for found in comparison.layers] == ["0"]
    with torch.no_grad():
        first, second = layer(x), model(x)
        signal = 2 * (first.double().square().sum() + second.double().square().sum())
    assert comparison.layers[0].alone.signal == pytest.approx(float(signal))
    assert comparison.layers[0].so_far.signal == pytest.approx(float(signal))
    alone = compare(layer, pack(layer, "int8"), [x])
    assert [found.name for found in alone.layers] == [""]
    assert alone.outputs == alone.layers[0].alone


def test_results_that_are_not_finite() -> None:
    difference = Difference()
    difference.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]))
    assert math.isnan(difference.snr)
    assert math.isnan(difference.largest)
    difference = Difference()
    difference.add(torch.zeros(2), torch.ones(2))
    assert difference.snr == -math.inf
    empty = Difference()
    empty.add(torch.empty(0), torch.empty(0))
    assert empty.snr == math.inf


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compare("model", Model(), BATCHES), TypeError, "expected two torch.nn.Modules, got a str"),
        (lambda: compare(Model(), Model(), BATCHES[0]), TypeError, "compare: expected batches, got one Tensor"),
        (lambda: compare(Model(), Model(), []), ValueError, "compare: there was no batch"),
        (lambda: compare(Model(), Model(), [3]), TypeError, "batch 1: expected a tensor, tuple or dict .* got int"),
        (
            lambda: compare(nn.Linear(4, 3), nn.Linear(4, 2), [torch.randn(2, 4)]),
            ValueError,
            r"same floating-point tensors, got \[\[2, 3\]\] and \[\[2, 2\]\]",
        ),
    ],
)
def test_mistakes_are_explained(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
