"""Weights that may be kept packed: only where the user asks, in inference, and where they are read as they are."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_pass
from fuse_pass.backend import FuseBackend
from fuse_pass.gemm import onednn, packed_weights
from fuse_pass.gemm.providers import Packed
from fuse_pass.inductor import compat
from fuse_pass.ops.fused_op import declaration_of
from fuse_pass.ops.prepacked import DensePrepacked
from tests.capture import Captured, capture, costs, everything_pays

ops = torch.ops.fuse_pass


@pytest.fixture(autouse=True)
def every_weight_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packed, "cost", lambda self, problem: 0.0 if self.computes_activation else 0.1)


def found(model: Callable[..., Any], *inputs: Tensor, grad: bool = False, **options: Any) -> Captured:
    with torch.set_grad_enabled(grad):
        return capture(model, *inputs, backend=FuseBackend(prepack=True, strict=True, **options))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], set[Any]]] = {
    "linear": (lambda: nn.Linear(8, 24), {ops.dense_prepacked.default}),
    "no bias": (lambda: nn.Linear(8, 24, bias=False), {ops.dense_prepacked.default}),
    "feed-forward": (
        lambda: nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 16)),
        {ops.dense_act_dense_inference.default},
    ),
    "feed-forward with PReLU": (
        lambda: nn.Sequential(nn.Linear(8, 24), nn.PReLU(), nn.Linear(24, 16)),
        {ops.dense_act_dense_inference.default},
    ),
    "gated": (Gated, {ops.gated_dense_inference.default}),
    "tied": (Tied, {ops.dense_prepacked.default}),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_blocks_are_found(name: str) -> None:
    build, expected = MODELS[name]
    captured = found(build(), torch.randn(4, 8))
    calls = [n for n in captured.rewritten[0].graph.nodes if n.target in expected]
    assert captured.report.counts()["prepack"] == len(calls) > 0
    for node in calls:
        op = declaration_of(node.target)
        assert op is not None
        assert op is DensePrepacked or op.of_call(node.args, node.kwargs).named()["prepack"]


def test_what_the_pattern_dense_has_replaced_is_found() -> None:
    with costs(everything_pays):
        captured = found(nn.Sequential(nn.Linear(8, 24), nn.Tanh()), torch.randn(4, 8))
    assert captured.report.counts() == {"dense": 1, "prepack": 1}
    (call,) = [n for n in captured.rewritten[0].graph.nodes if n.target is ops.dense_prepacked.default]
    assert call.args[3:] == ("tanh",)


def test_only_where_the_user_asks() -> None:
    with torch.no_grad():
        assert "prepack" not in capture(nn.Linear(8, 24), torch.randn(4, 8)).report.counts()


def _view_of_a_weight(x: Tensor, weight: nn.Parameter) -> Tensor:
    return F.linear(x, weight[:4])


def _stored_the_other_way(x: Tensor, weight: nn.Parameter) -> Tensor:
    return x[:, :6] @ weight[:6]


def _written_before(x: Tensor, weight: nn.Parameter) -> Tensor:
    weight.mul_(2)
    return F.linear(x, weight)


def _written_after(x: Tensor, weight: nn.Parameter) -> Tensor:
    y = F.linear(x, weight)
    weight.mul_(2)
    return y


def _autocast(x: Tensor, weight: nn.Parameter) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, weight)


@pytest.mark.parametrize(
    "function", [_view_of_a_weight, _stored_the_other_way, _written_before, _written_after, _autocast]
)
def test_a_weight_that_is_not_read_as_it_is(function: Callable[..., Tensor]) -> None:
    report = found(function, torch.randn(4, 8), nn.Parameter(torch.randn(6, 8))).report
    assert (report.matches, report.declines) == ([], [])


def test_a_tensor_that_is_no_parameter() -> None:
    assert found(F.linear, torch.randn(4, 8), torch.randn(6, 8)).report.matches == []


def test_with_gradients_nothing_is_packed() -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 16))
    assert found(model, torch.randn(4, 8), grad=True).report.counts() == {"dense_act_dense": 1}
    assert found(model.requires_grad_(False), torch.randn(4, 8), grad=True).report.counts()["prepack"] == 1


@pytest.mark.skipif(compat.onednn_linear() is None, reason="this build of PyTorch lacks oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.processor)])
@pytest.mark.parametrize("name", ["feed-forward", "gated", "tied"])
def test_compiled_never_stale(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "PACKED", packed_weights.PackedWeights())
    model = MODELS[name][0]().to(dtype)
    compiled = torch.compile(model, backend=FuseBackend(prepack=True, strict=True), dynamic=True)
    parameters = list(model.parameters())
    with torch.no_grad():
        for step, rows in enumerate((4, 4, 4, 7, 7, 1)):
            x = torch.randn(rows, 8, dtype=dtype)
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
            if step == 2:
                matrices = {id(p) for p in parameters if p.dim() == 2}
                assert len(packed_weights.PACKED) == len(matrices) * onednn.multiplies(dtype)
                torch._foreach_mul_(parameters, -1.5)
            if step == 3:
                model.load_state_dict({key: value * 0.5 for key, value in model.state_dict().items()})
    del compiled, model, parameters
    torch._dynamo.reset()
    gc.collect()
    assert len(packed_weights.PACKED) == 0


def test_the_option_may_be_given_to_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(8, 24), torch.randn(4, 8)
    for options, counts in (({"prepack": True}, {"prepack": 1}), ({}, {})):
        torch._dynamo.reset()
        with torch.no_grad(), fuse_pass.collect() as report:
            torch.compile(model, backend="fuse_pass", options=options)(x)
        assert report.counts() == counts


def test_elsewhere_it_says_that_it_does_nothing() -> None:
    """On the meta device, as on a GPU."""
    with pytest.warns(RuntimeWarning, match="prepack=True does nothing"):
        elsewhere = found(nn.Linear(8, 8, device="meta"), torch.empty(2, 8, device="meta"))
    (note,) = elsewhere.report.notes
    assert "on a CPU" in str(note)
    assert found(nn.Linear(8, 8), torch.ones(2, 8)).report.notes == []
