"""The contenders of a row: one step each, the same numbers, and what is read off them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fuse_pass.bench.contenders import Step, _settings, contenders, own_function, placed, tensors_of
from fuse_pass.bench.models import mlp
from fuse_pass.bench.rows import Row
from fuse_pass.commands.errors import CommandError
from fuse_pass.commands.named_models import Example

_ROWS, _DIM, _HIDDEN = 6, 20, 28


def dense() -> Example:
    torch.manual_seed(0)
    return Example(mlp(_DIM, _HIDDEN), (torch.randn(_ROWS, _DIM, requires_grad=True),))


def silent(word: str) -> None:
    """Progress that nobody reads."""


def test_training_contenders_agree_and_ours_saves_less() -> None:
    found = contenders(Row("dense", dense, train=True), "cpu", silent)
    assert list(found.steps) == ["eager", "torch.compile", "fuse_pass"]
    assert set(found.first_call_seconds) == {"torch.compile", "fuse_pass"}
    assert all(seconds > 0 for seconds in found.first_call_seconds.values())
    assert found.report.counts() == {"dense_act_dense": 1}
    gradients = {}
    for name, step in found.steps.items():
        step()
        gradients[name] = [leaf.grad.clone() for leaf in step.leaves]
    for name in ("torch.compile", "fuse_pass"):
        for ours, eager in zip(gradients[name], gradients["eager"], strict=True):
            torch.testing.assert_close(ours, eager)
    x, hidden = _ROWS * _DIM * 4, _ROWS * _HIDDEN * 4
    assert found.steps["eager"].saved_bytes() == x + 2 * hidden, "x, h and gelu(h)"
    assert found.steps["fuse_pass"].saved_bytes() == x + hidden, "x and h"


def test_inference_contenders_and_constant_weights() -> None:
    words: list[str] = []
    found = contenders(Row("dense", dense, train=False), "cpu", words.append)
    assert list(found.steps) == ["eager", "torch.compile", "freezing", "max-autotune", "fuse_pass"]
    assert [word.split()[0] for word in words] == list(found.steps)[1:]
    expected = found.steps["eager"].forward()
    for step in found.steps.values():
        torch.testing.assert_close(step.forward(), expected)
        assert not step.forward().requires_grad
        for parameter in step.example.model.parameters():
            parameter.data.zero_()
    for name, step in found.steps.items():
        frozen = name in ("freezing", "max-autotune")
        assert bool(step.forward().abs().max() > 0) == frozen, f"{name}: takes the weights as constants or not"


def test_autotuning_and_freezing_take_part_where_they_mean_something() -> None:
    row = Row("dense", dense, train=False)
    assert list(_settings(row)) == ["torch.compile", "freezing", "max-autotune", "fuse_pass"]
    assert list(_settings(dataclasses.replace(row, autotune=False))) == ["torch.compile", "freezing", "fuse_pass"]
    assert list(_settings(dataclasses.replace(row, train=True))) == ["torch.compile", "fuse_pass"]


def test_a_setting_that_fails_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refuse() -> Iterator[None]:
        raise RuntimeError("no constants here\nmore")
        yield

    monkeypatch.setattr("fuse_pass.bench.contenders.constant_weights", refuse)
    words: list[str] = []
    row = Row("identity", lambda: Example(nn.ReLU(), (torch.ones(2),)), train=False, autotune=False)
    assert list(contenders(row, "cpu", words.append).steps) == ["eager", "torch.compile", "fuse_pass"]
    assert "freezing failed (RuntimeError: no constants here)" in words


def test_a_model_that_fails_is_not_hidden() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x

    row = Row("broken", lambda: Example(Broken(), (torch.ones(2, 3),)), train=False)
    with pytest.raises(Exception, match="must have same reduction dim"):
        contenders(row, "cpu", silent)


def test_autocast_surrounds_forward() -> None:
    row = Row("dense", dense, train=True, autocast=torch.bfloat16)
    example = dense()
    step = Step(example.model, example, row)
    assert step.forward().dtype is torch.bfloat16
    step()
    assert step.leaves[0].grad is not None
    assert step.leaves[0].grad.dtype is torch.float32


def test_outputs_of_any_shape_are_trained() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"a": self.a(x), "rest": [self.b(x), x.argmax()], "text": "x"}

    example = Example(Several(), (torch.randn(2, 3),))
    Step(example.model, example, Row("several", lambda: example, train=True))()
    assert all(parameter.grad is not None for parameter in example.model.parameters())


def test_nothing_to_train_is_a_mistake() -> None:
    example = Example(nn.ReLU(), (torch.ones(2),))
    with pytest.raises(CommandError, match="relu: expected an output that depends on a parameter, got none to train"):
        Step(example.model, example, Row("relu", lambda: example, train=True))()


def test_a_model_that_cannot_be_copied_is_a_mistake() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("derived", model.weight * 2)
    row = Row("derived", lambda: Example(model, (torch.ones(1, 2),)), train=True)
    with pytest.raises(CommandError, match=r"derived: expected a model that copy.deepcopy can copy, got Linear"):
        contenders(row, "cpu", silent)


def test_functions_do_not_share_compiled_code() -> None:
    model = nn.ReLU()
    first, second = own_function(model), own_function(model)
    assert first.__code__ is not second.__code__
    assert first(torch.tensor(-1.0)) == 0


def test_tensors_inside_anything() -> None:
    a, b, c = (torch.ones(1) for _ in range(3))
    found = tensors_of(({"x": a, "y": [b, 3]}, (None, "text", c)))
    assert [tensor.data_ptr() for tensor in found] == [a.data_ptr(), b.data_ptr(), c.data_ptr()]


def test_placed_tensors_are_leaves() -> None:
    x = torch.ones(2, requires_grad=True)
    (moved, again), other = placed(((x * 1, x.detach()), {"n": 3}), "cpu")
    assert moved.is_leaf
    assert moved.requires_grad
    assert not again.requires_grad
    assert other == {"n": 3}
