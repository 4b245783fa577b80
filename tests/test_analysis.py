"""`coverage` looks and leaves no trace."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import fuse_pass


class Stateful(nn.Module):
    """Batch statistics, a counter that is replaced, a flag that flips, and random numbers of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)
        self.norm, self.batch_norm = nn.LayerNorm(6), nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        y = self.down(torch.relu(self.up(self.batch_norm(x))))
        return self.norm(x + self.dropout(y))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training: bool, compiled: bool) -> None:
    model = Stateful().train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    looked_at = torch.compile(model, backend="eager") if compiled else model
    report = fuse_pass.coverage(looked_at, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert report.counts() == {"dense_act_dense": 1, "dropout_norm": 1}
    assert all(module.training is training for module in model.modules())
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_flags_come_back_even_after_an_error() -> None:
    class Failing(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            self.eval()
            raise ArithmeticError("no")

    model = Failing()
    with pytest.raises(ArithmeticError):
        fuse_pass.coverage(model, torch.randn(4, 6))
    assert model.training
    assert model.dropout.training


def test_keyword_arguments_and_functions() -> None:
    def scaled(x: Tensor, *, scale: float) -> Tensor:
        return nn.functional.layer_norm(x + scale * x, (6,))

    assert fuse_pass.coverage(scaled, torch.randn(4, 6), scale=2.0).counts() == {"dropout_norm": 1}


def test_compiled_models_can_be_looked_at() -> None:
    model, x = Stateful().eval(), torch.randn(4, 6)
    compiled = torch.compile(model, backend="eager")
    assert fuse_pass.coverage(compiled, x).counts() == {"dense_act_dense": 1, "dropout_norm": 1}
    function = torch.compile(lambda x: nn.functional.layer_norm(x + x.cos(), (6,)), backend="eager")
    assert fuse_pass.coverage(function, x).counts() == {"dropout_norm": 1}


def test_compiled_code_of_the_user_is_not_disturbed() -> None:
    model, x = Stateful().eval(), torch.randn(4, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    fuse_pass.coverage(model, x)
    with torch.compiler.set_stance("fail_on_recompile"):
        y = compiled(x)
    torch.testing.assert_close(y, model(x))


def test_graphs_of_a_broken_model_are_merged() -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Stateful(), Stateful()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    report = fuse_pass.coverage(Breaking(), torch.randn(4, 6))
    assert report.graphs == 2
    assert report.counts() == {"dense_act_dense": 2, "dropout_norm": 2}


def test_a_failing_pattern_is_an_error_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("broken pattern")

    monkeypatch.setattr("fuse_pass.backend.apply", fail)
    with pytest.raises(Exception, match="broken pattern"):
        fuse_pass.coverage(Stateful(), torch.randn(4, 6))
