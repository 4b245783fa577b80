"""Whole models are compared in three calls with all random numbers alike, and their compilations are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.testing import levels
from fuse_pass.testing.compare import Status, Verdict, judge
from fuse_pass.testing.differences import differences, noise_of
from fuse_pass.testing.model_runs import Compilations, ModelRuns
from tests.testing.faults import FAULTS


class Block(nn.Module):
    """Every source of random numbers that the zoo has, around both patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        self.steps += 1
        y, _ = self.attention(x, x, x, need_weights=False, key_padding_mask=padding)
        y = y * F.dropout(x, 0.25, self.training)
        if self.training:
            keep = 0.5 + torch.rand(x.shape[0], 1, 1, dtype=x.dtype)
            y = y * keep.floor_() + torch.rand_like(x) + x.new_empty(x.shape[-1]).bernoulli_(0.5)
            y = y + torch.empty_like(x).uniform_(-1, 1) + torch.empty_like(x).exponential_(2.0)
        z = F.dropout(self.down(F.gelu(self.up(y))), 0.25, self.training) + x
        return self.norm(z), {"mean": y.float().mean()}


def runs_of(model: nn.Module, training: bool = True, **options: Any) -> ModelRuns:
    torch.manual_seed(0)
    return ModelRuns(model, (torch.randn(3, 5, 8),), {}, training=training, **options)


def verdict_of(runs: ModelRuns) -> Verdict:
    with levels.ready_to_compare():
        return judge(runs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_model_with_all_kinds_of_random_numbers_is_right(training: bool) -> None:
    verdict = verdict_of(runs_of(Block(), training))
    assert verdict.status is Status.RIGHT, str(verdict)
    assert verdict.report.counts() == {"dense_act_dense": 2, "dropout_norm": 2}, "in two graphs, one for each batch"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_eager_and_the_reference_are_one_function_of_the_same_data(training: bool) -> None:
    """Else every error would be allowed."""
    runs = runs_of(Block(), training)
    with levels.ready_to_compare():
        noise = noise_of([(runs.eager(seed), runs.exact(seed)) for seed in (0, 1)])
    assert {"output 0", "output 1", "input 0 after the call"} <= noise.keys()
    assert ("gradient of parameter up.weight" in noise) == training
    assert max(noise.values()) < 1e-5


@pytest.mark.parametrize("name", ["norm bias not applied", "mask of backward is another", "bias dropped in inference"])
def test_a_fault_is_found(name: str) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    with fault.installed():
        assert verdict_of(runs_of(Block(), "inference" not in name)).status is Status.WRONG


def test_exact_means_float64_all_along() -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.softmax(x.bfloat16(), -1, dtype=torch.float32).half() + torch.arange(8, dtype=torch.float32) / 3
            return y.to(torch.float32) + torch.ones(()) / 3

    runs = runs_of(Narrow())
    with levels.ready_to_compare():
        eager, exact = runs.eager(0)[0].outputs[0], runs.exact(0)[0].outputs[0]
    assert (eager.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert not torch.equal(exact, exact.float().double())
    assert (eager - exact).abs().max() > 1e-4, "bfloat16 and float16 in eager"


def test_experts_of_a_grouped_product_are_exact() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 16))

        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(0, -2)
            ends = torch.tensor([4, 4, rows.shape[0] - 1], dtype=torch.int32)
            return F.grouped_mm(rows, self.weight, offs=ends)[:-1]

    runs = runs_of(Experts())
    with levels.ready_to_compare():
        eager, exact = runs.eager(0), runs.exact(0)
        assert not list(differences(eager, eager, exact))
    assert exact[0].grads["parameter weight"] is not None


def compilations(model: nn.Module, backend: levels.Backend) -> Compilations:
    runs = runs_of(model, training=False)
    with levels.ready_to_compare():
        runs.compiled(backend)(0)
    return runs.compilations[0]


def test_compilations_are_counted() -> None:
    class Broken(Block):
        def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
            y = self.up(x)
            torch._dynamo.graph_break()
            return y.sin(), {}

    def unchanged(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return gm.forward

    whole, broken = compilations(Block(), unchanged), compilations(Broken(), unchanged)
    assert (whole.graphs, whole.breaks) == (2, {}), "the other batch is compiled once more"
    assert (broken.graphs, sum(broken.breaks.values())) == (4, 2)
    assert broken.frames["ok"] > whole.frames["ok"]


def test_a_backend_that_specialises_on_sizes_is_compiled_more_often() -> None:
    model = Block().eval()

    def specialising(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        for value in inputs:
            if isinstance(value, torch.SymInt):
                int(value)
        return gm.forward

    def count(backend: levels.Backend) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        call = torch.compile(model, backend=backend)
        with torch.no_grad():
            for batch in (3, 4, 5, 6):
                call(torch.randn(batch, 5, 8))
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    assert count(specialising) > count(levels.fused("aot")) == 2
