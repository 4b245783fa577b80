"""The rows of the bench: every one can be had by name, runs, and holds what it is about."""

from __future__ import annotations

import dataclasses
import fnmatch

import pytest
import torch

import fuse_pass
import models
from fuse_pass.bench import command
from fuse_pass.bench.contenders import Step
from fuse_pass.bench.rows import REFERENCE_MODELS, ROWS, Row
from fuse_pass.commands.named_models import Example

_OPERATIONS = [row for row in ROWS if fnmatch.fnmatch(row.name, "d*/512*") or fnmatch.fnmatch(row.name, "d*/2048*")]
_TRANSFORMERS = [row for row in ROWS if row.name.split("/")[0] in ("bert", "gpt2", "vit") and row.train]


def test_names_are_one_to_one() -> None:
    names = [line.name for line in command.LINES]
    assert len(set(names)) == len(names)


def test_every_reference_model_has_its_rows() -> None:
    assert REFERENCE_MODELS == models.NAMES
    names = {row.name for row in ROWS}
    assert {f"models/{name}/{mode}" for name in models.NAMES for mode in ("train", "infer")} <= names


@pytest.mark.parametrize("row", _OPERATIONS, ids=lambda row: row.name)
def test_operations_are_fused(row: Row) -> None:
    example = row.build()
    report = fuse_pass.coverage(example.model.train(row.train), *example.args)
    assert set(report.counts()) == {row.name.split("/")[0]}
    assert report.declines == []
    tensors = (*example.args, *example.model.parameters())
    assert {tensor.dtype for tensor in tensors} == {row.dtype}
    assert all(tensor.requires_grad == row.train for tensor in example.args)


@pytest.mark.parametrize("row", _TRANSFORMERS, ids=lambda row: row.name)
def test_transformers_have_the_published_width_and_are_fused(row: Row) -> None:
    example = row.build()
    report = fuse_pass.coverage(example.model.train(), *example.args)
    counts = report.counts()
    del counts["dense"]  # as the machine has it
    assert counts == {"dense_act_dense": 4, "dropout_norm": 9}
    assert report.declines == []
    widths = {module.weight.shape for module in example.model.modules() if isinstance(module, torch.nn.Linear)}
    assert {(768, 768), (3072, 768), (768, 3072)} <= widths
    assert len(example.args[0]) == 4


def test_encoders_compute_what_the_reference_models_do() -> None:
    """Without heads, the bench's BERT and GPT-2 are the bodies of those in models/."""
    from fuse_pass.bench.models import BertEncoder, GPT2Decoder

    bert, gpt2 = (models.load(name) for name in ("bert", "gpt2"))
    model, inputs = bert.build().eval(), bert.example_inputs()
    x = BertEncoder(model)(*inputs)
    scores = torch.nn.functional.gelu(model.token_transform(x))
    scores = torch.nn.functional.linear(model.token_norm(scores), model.embeddings.tokens.weight, model.token_bias)
    torch.testing.assert_close(scores, model(*inputs)[0])
    decoder, tokens = gpt2.build().eval(), gpt2.example_inputs()
    hidden = GPT2Decoder(decoder)(*tokens)
    torch.testing.assert_close(hidden @ decoder.tokens.weight.T, decoder(*tokens))


@pytest.mark.parametrize("row", [row for row in ROWS if row.name.startswith("tiny/")], ids=lambda row: row.name)
def test_tiny_rows_have_batch_1_and_width_32(row: Row) -> None:
    example = row.build()
    assert len(example.args[0]) == 1
    assert any(32 in parameter.shape for parameter in example.model.parameters())
    Step(example.model, example, row)()


@pytest.mark.parametrize("row", [row for row in ROWS if row.name.startswith("models/")], ids=lambda row: row.name)
def test_reference_models_take_a_step(row: Row) -> None:
    example = row.build()
    assert len(example.args[0]) == 8
    step = Step(example.model.train(row.train), example, row)
    step()
    has_gradients = any(parameter.grad is not None for parameter in example.model.parameters())
    assert has_gradients == row.train


def test_product_dtype_is_that_of_autocast() -> None:
    row = Row("a", lambda: Example(torch.nn.Identity(), ()), train=False)
    assert row.product_dtype is torch.float32
    assert dataclasses.replace(row, autocast=torch.bfloat16).product_dtype is torch.bfloat16
