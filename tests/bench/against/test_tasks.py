"""What contenders are asked to do: float64 as the truth, inputs by position, the same model in another process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fuse_pass.bench.against import accuracy
from fuse_pass.bench.against.apart import measured_apart
from fuse_pass.bench.against.contender import FLOAT, INT8, Task
from fuse_pass.bench.against.tasks import float_task, packed_task, task_of
from fuse_pass.bench.packed import PACKED_ROWS
from fuse_pass.bench.rows import ROWS
from fuse_pass.commands.errors import CommandError
from fuse_pass.commands.named_models import Example

_TINY = "tiny/dense_act_dense/1x32x128/fp32/infer"


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, *, index: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return {"y": self.layer(x[index]) * weight}


def weighted() -> Task:
    named = {"index": torch.tensor([1, 0]), "weight": torch.tensor(2.0)}
    return Task(Example(Weighted(), (torch.randn(2, 3),), named), FLOAT, 1)


def test_inputs_by_position() -> None:
    asked = weighted()
    model, inputs = asked.positional()
    assert len(inputs) == 3
    torch.testing.assert_close(model(*inputs), asked.example.model(*asked.example.args, **asked.example.kwargs))
    plain = Task(Example(nn.ReLU(), (torch.ones(2),)), FLOAT, 1)
    assert plain.positional()[0] is plain.example.model


def test_inputs_that_are_no_tensors() -> None:
    with pytest.raises(CommandError, match="expected inputs that are tensors"):
        Task(Example(nn.ReLU(), (3,)), FLOAT, 1).positional()


def test_the_truth_is_in_float64_and_leaves_indices_alone() -> None:
    asked = weighted()
    (truth,) = accuracy.in_float64(asked)
    assert truth.dtype is torch.float64
    assert asked.example.model.layer.weight.dtype is torch.float32
    model, inputs = asked.positional()
    error = accuracy.relative_error([model(*inputs)["y"]], [truth])
    assert error < 1e-6
    assert accuracy.relative_error([truth * 1.5], [truth]) == pytest.approx(0.5)


def test_rows_that_are_not_for_contenders() -> None:
    row = next(row for row in ROWS if row.name == _TINY)
    example = row.build()
    assert float_task(row, example, 3) == Task(example, FLOAT, 3)
    for change, reason in (({"train": True}, "inference only"), ({"autocast": torch.bfloat16}, "no autocast")):
        with pytest.raises(CommandError, match=reason):
            float_task(dataclasses.replace(row, **change), example, 1)


def test_ternary_rows_give_everybody_the_ternary_model() -> None:
    row = next(row for row in PACKED_ROWS if row.name == "numbers/packed/b1.58/1")
    torch.manual_seed(0)
    models = row.models()
    for layer in (models.plain.model[0], models.plain.model[2]):
        assert len(layer.weight.unique()) == 3
    asked = packed_task(row, models.plain, 1)
    assert asked.kind == INT8
    ours = accuracy.relative_error([models.packed(*models.plain.args)], accuracy.in_float64(asked))
    assert ours < 0.05, "inputs of 8 bits are all that is lost"


def test_a_row_by_name_is_the_same_model_again() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(task_of(_TINY, 1))
    first, second = found
    assert first.kind == FLOAT
    assert torch.equal(first.example.args[0], second.example.args[0])
    both = zip(first.example.model.parameters(), second.example.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in both)


def test_a_process_of_its_own() -> None:
    found = measured_apart("torch_dynamic", "numbers/packed/int8/1", threads=1, seconds=0.0)
    assert set(found.samples) == {"torch_dynamic", "eager"}
    assert all(len(values) >= 9 and min(values) > 0 for values in found.samples.values())
    assert 1e-3 < found.error < 0.1


def test_a_process_of_its_own_says_why_not() -> None:
    with pytest.raises(CommandError, match="its process ended with 1, saying StopIteration"):
        measured_apart("torch_dynamic", "no/such/row", threads=1, seconds=0.0)
