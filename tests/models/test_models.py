"""The reference models: every expected fusion is found, and nothing that they compute changes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from fuse_pass.backend import fuse_backend
from fuse_pass.report import collect
from tests.capture import capture
from tests.precision import assert_as_exact_as_eager

each_model = pytest.mark.parametrize("name", models.NAMES)
each_mode = pytest.mark.parametrize("mode", ["train", "eval"])

_DROPOUT_FIELDS = ("dropout", "drop_path")
_DROPPING = [name for name in models.NAMES if any(getattr(models.load(name).CONFIG, f, 0) for f in _DROPOUT_FIELDS)]

# Name, classmethod of the config, millions of parameters as published: in the paper, with the weights, or in papers
# that compare with the model.
_PUBLISHED = [
    ("bert", "base", 110.0),
    ("convnext", "tiny", 29.0),
    ("gpt2", "small", 124.0),
    ("llama", "llama_7b", 6700.0),
    ("lstm_lm", "large", 66.0),
    ("mlp_mixer", "base_16", 59.0),
    ("resnet", "resnet50", 25.6),
    ("t5", "base", 220.0),
    ("vit", "base_16", 86.0),
    ("whisper", "small", 244.0),
]


def without_dropout(config: Any) -> Any:
    """The same config with every dropout probability 0."""
    present = [field.name for field in dataclasses.fields(config) if field.name in _DROPOUT_FIELDS]
    return dataclasses.replace(config, **dict.fromkeys(present, 0.0))


def build(name: str, mode: str, *, drops: bool = True) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A reference model in one mode, and inputs for it."""
    module = models.load(name)
    config = module.CONFIG if drops else without_dropout(module.CONFIG)
    return module.build(config).train(mode == "train"), module.example_inputs(config)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients_of(model: nn.Module, outputs: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The gradients of all parameters by name, for the same random cotangents in every dtype."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in as_tuple(outputs)]
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(as_tuple(outputs), parameters, cotangents)
    return dict(zip(names, gradients, strict=True))


def joined(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def in_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@each_mode
@each_model
def test_every_expected_fusion_is_found(name: str, mode: str) -> None:
    model, inputs = build(name, mode)
    report = capture(model, *inputs).report
    assert report.counts() == models.load(name).EXPECTED[mode], f"\n{report}"


@each_mode
@each_model
def test_values_and_gradients_are_as_exact_as_eager(name: str, mode: str) -> None:
    model, inputs = build(name, mode, drops=False)
    # Copies, since BatchNorm in training changes its buffers.
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    captured = capture(model, *inputs)
    outputs, expected, reference = captured.output, eager(*inputs), exact(*map(in_float64, inputs))
    assert captured.report.counts() == models.load(name).EXPECTED["eval"], "p = 0 is found as in evaluation"
    for values in zip(*map(as_tuple, (outputs, expected, reference)), strict=True):
        assert_as_exact_as_eager(*values, f"{name}, {mode}, output")
    ours, theirs, truth = gradients_of(model, outputs), gradients_of(eager, expected), gradients_of(exact, reference)
    worst = max(truth, key=lambda parameter: (ours[parameter] - truth[parameter]).abs().max().item())
    # All at once: where a norm removes a bias, its gradient is nothing but rounding, which has no scale of its own.
    assert_as_exact_as_eager(joined(ours), joined(theirs), joined(truth), f"{name}, {mode}, gradients, most {worst}")


@pytest.mark.parametrize("name", _DROPPING)
def test_dropout_follows_the_seed(name: str) -> None:
    model, inputs = build(name, "train")

    def run(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(seed)
        outputs = capture(model, *inputs).output
        return as_tuple(outputs)[0], gradients_of(model, outputs)

    (output, gradients), (again, gradients_again), (other, _) = run(3), run(3), run(4)
    assert torch.equal(output, again)
    assert torch.equal(joined(gradients), joined(gradients_again))
    assert joined(gradients).isfinite().all()
    assert not torch.equal(output, other), "another seed draws the same masks"


@pytest.mark.parametrize(("name", "size", "millions"), _PUBLISHED)
def test_published_sizes(name: str, size: str, millions: float) -> None:
    module = models.load(name)
    with torch.device("meta"):
        model = module.build(getattr(type(module.CONFIG), size)())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1e6 * millions, rel=0.02)


def test_sizes_without_a_published_count() -> None:
    with torch.device("meta"):
        classifier = models.load("classifier")
        digits = classifier.build(classifier.ClassifierConfig.digits())
        seq2seq = models.load("gru_seq2seq")
        rnnsearch = seq2seq.build(seq2seq.Seq2SeqConfig.rnnsearch())
    linears = 784 * 512 + 512 + 512 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10
    assert sum(parameter.numel() for parameter in digits.parameters()) == linears + 2 * 512
    assert rnnsearch.encoder.weight_hh_l0_reverse.shape == (3 * 1000, 1000)


@each_model
def test_dynamic_shapes_and_another_batch(name: str) -> None:
    module = models.load(name)
    model = module.build().eval()
    inputs = module.example_inputs(batch=3, seed=5)
    assert all(len(tensor) == 3 for tensor in inputs)
    captured = capture(model, *inputs, dynamic=True)
    for ours, eager in zip(as_tuple(captured.output), as_tuple(model(*inputs)), strict=True):
        torch.testing.assert_close(ours, eager)
    assert captured.report.counts() == module.EXPECTED["eval"]


@pytest.mark.parametrize(("name", "parts"), [("lstm_lm", 2), ("gru_seq2seq", 3)])
def test_recurrent_models_reach_the_backend_only_where_dynamo_allows(name: str, parts: int) -> None:
    """Or in parts, from torch 2.15 on."""
    model, inputs = build(name, "eval")
    assert capture(model, *inputs).report.graphs == (parts if torch.__version__ >= "2.15" else 0)
    with torch._dynamo.config.patch(allow_rnn=True):
        captured = capture(model, *inputs, fullgraph=True)
    assert captured.report.graphs == 1
    torch.testing.assert_close(captured.output, model(*inputs))


@pytest.mark.parametrize("name", ["bert", "classifier"])
def test_compiled_by_inductor(name: str) -> None:
    model, inputs = build(name, "eval")
    with torch.no_grad(), collect() as report:
        ours = torch.compile(model, backend=fuse_backend)(*inputs)
        eager = model(*inputs)
    assert report.counts() == models.load(name).EXPECTED["eval"]
    for value, expected in zip(as_tuple(ours), as_tuple(eager), strict=True):
        torch.testing.assert_close(value, expected)


def test_every_file_is_listed() -> None:
    files = {path.stem for path in Path(models.__file__).parent.glob("*.py")}
    assert files - {"__init__", "layers"} == set(models.NAMES)


def test_an_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"'berd'.*bert, classifier"):
        models.load("berd")
