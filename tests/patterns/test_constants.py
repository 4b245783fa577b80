"""Constants are taken from the match: change one in the model, and the fused result changes exactly as eager's does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.patterns import spellings
from tests.capture import Captured
from tests.patterns.truth import assert_agrees, assert_fused_like_eager, eager, fused

dense_inputs = spellings.dense_act_dense.CORPUS.example_inputs
norm_inputs = spellings.dropout_norm.CORPUS.example_inputs

ACTIVATIONS: dict[str, Any] = {
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU(approximate="tanh"),
    "ReLU": nn.ReLU(),
    "ReLU in place": nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.3),
    "LeakyReLU in place": nn.LeakyReLU(0.3, inplace=True),
    "LeakyReLU rising to the left": nn.LeakyReLU(-0.5),
    "PReLU": nn.PReLU(1, init=0.4),
    "PReLU per channel": nn.PReLU(24),
    "ELU": nn.ELU(0.6),
    "ELU in place": nn.ELU(1.7, inplace=True),
    "SELU": nn.SELU(),
    "SELU in place": nn.SELU(inplace=True),
    "SiLU": nn.SiLU(),
    "SiLU in place": nn.SiLU(inplace=True),
    "Mish": nn.Mish(),
    "Mish in place": nn.Mish(inplace=True),
}


def assert_module_fuses(module: nn.Module, arguments: list[Tensor], pattern: str) -> Captured:
    """A module with parameters, fused and eager and in float64; gradients of inputs and parameters alike."""
    names = [name for name, _ in module.named_parameters()]

    def call(*values: Any) -> Any:
        return torch.func.functional_call(module, dict(zip(names, values, strict=False)), values[len(names) :])

    def values(dtype: torch.dtype) -> list[Tensor]:
        return [value.detach().to(dtype, copy=True).requires_grad_() for value in (*module.parameters(), *arguments)]

    found, ours = fused(call, values(torch.float32))
    assert_agrees(ours, eager(call, values(torch.float32)), eager(call, values(torch.float64)))
    assert found.report.counts() == {pattern: 1}, str(found.report)
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True), (False, False)])
def test_activation_modules(activation: str, bias: tuple[bool, bool]) -> None:
    module = ACTIVATIONS[activation]
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.1, 0.6)
    model = nn.Sequential(nn.Linear(8, 24, bias=bias[0]), module, nn.Linear(24, 16, bias=bias[1]))
    assert_module_fuses(model, [torch.randn(5, 8)], "dense_act_dense")


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_dropout_between_linears(p: float, in_place: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Dropout(p, inplace=in_place), nn.Linear(24, 16))
    found = assert_module_fuses(model, [torch.randn(5, 8)], "dense_act_dense")
    assert len(found.calls("seed")) == (p > 0)


def test_dropout_between_linears_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 16)).eval()
    found = assert_module_fuses(model, [torch.randn(5, 8)], "dense_act_dense")
    assert found.calls("seed") == []


class AddNorm(nn.Module):
    """norm(residual + dropout(x)) or the other way round."""

    def __init__(self, norm: nn.Module, p: float = 0.0, residual_first: bool = False) -> None:
        super().__init__()
        self.norm, self.dropout, self.residual_first = norm, nn.Dropout(p), residual_first

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        dropped = self.dropout(x)
        return self.norm(residual + dropped if self.residual_first else dropped + residual)


NORMS: dict[str, Any] = {
    "LayerNorm": lambda: nn.LayerNorm(24),
    "LayerNorm eps": lambda: nn.LayerNorm(24, eps=0.1),
    "LayerNorm over two": lambda: nn.LayerNorm((5, 24)),
    "LayerNorm over all": lambda: nn.LayerNorm((3, 5, 24)),
    "LayerNorm without bias": lambda: nn.LayerNorm(24, bias=False),
    "LayerNorm without affine": lambda: nn.LayerNorm(24, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(24),
    "RMSNorm eps": lambda: nn.RMSNorm(24, eps=0.1),
    "RMSNorm over two": lambda: nn.RMSNorm((5, 24), eps=1e-3),
    "RMSNorm without affine": lambda: nn.RMSNorm(24, elementwise_affine=False),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("residual_first", [False, True])
def test_norm_modules(norm: str, p: float, residual_first: bool) -> None:
    module = AddNorm(NORMS[norm](), p, residual_first)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    found = assert_module_fuses(module, [torch.randn(3, 5, 24), torch.randn(3, 5, 24)], "dropout_norm")
    assert found.calls("dropout_norm")[0].args[-1] is residual_first


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_default_eps_of_rms_norm(scale: float, dtype: torch.dtype) -> None:
    """Without eps it is the machine epsilon of the arithmetic; inputs as small as its root show which."""
    x, r = (torch.randn(5, 24, dtype=torch.float64).mul(scale).to(dtype) for _ in range(2))
    found, ours = fused(lambda x, r: F.rms_norm(x + r, (24,)), [x, r])
    assert found.report.counts() == {"dropout_norm": 1}
    eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    exact = eager(lambda x, r: F.rms_norm((x + r).double(), (24,), eps=eps), [x, r])
    assert_agrees(ours, eager(lambda x, r: F.rms_norm(x + r, (24,)), [x, r]), exact)


@pytest.mark.parametrize("first", [1e-5, 1e-2, 1.0])
def test_a_changed_eps_changes_the_result(first: float) -> None:
    """The guard of this file: another constant is far outside the tolerance."""
    inputs = norm_inputs()
    found, ours = fused(lambda x, r, w, b: F.layer_norm(x + r, (24,), w, b, first), list(inputs.values()))
    assert found.report.counts() == {"dropout_norm": 1}
    other = F.layer_norm(inputs["x"] + inputs["residual"], (24,), inputs["weight"], inputs["bias"], 10 * first)
    assert not torch.allclose(ours.values[0], other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_p_as_an_argument(p: float) -> None:
    """With dynamic shapes, p is an input of the graph and not a number."""

    def function(p: float, x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(F.dropout(x, p) + r, (24,), w, b)

    for dynamic in (False, True):
        assert_fused_like_eager(function, {"p": p, **norm_inputs()}, dynamic=dynamic, counts={"dropout_norm": 1})


@pytest.mark.parametrize("dynamic", [False, True])
def test_constants_as_arguments(dynamic: bool) -> None:
    def function(slope: float, p: float, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.dropout(F.leaky_relu(F.linear(x, w1, b1), slope), p), w2, b2)

    inputs = {"slope": 0.35, "p": 0.6, **dense_inputs()}
    assert_fused_like_eager(function, inputs, dynamic=dynamic, counts={"dense_act_dense": 1})


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_eps_as_an_argument(dynamic: bool, norm: str) -> None:
    def function(eps: float, x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return getattr(F, norm)(x + r, (24,), w, eps=eps)  # type: ignore[no-any-return]

    inputs = {"eps": 0.03, **norm_inputs()}
    assert_fused_like_eager(function, inputs, dynamic=dynamic, counts={"dropout_norm": 1})


@pytest.mark.parametrize("training", [False, True])
def test_training_as_an_argument(training: bool) -> None:
    def function(training: bool, x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(F.dropout(x, 0.4, training) + r, (24,), w, b)

    found = assert_fused_like_eager(function, {"training": training, **norm_inputs()}, counts={"dropout_norm": 1})
    assert len(found.calls("seed")) == training


def test_inference_takes_the_op_without_saved_values() -> None:
    inputs = dense_inputs()
    with torch.no_grad():
        found, _ = fused(lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2), [*inputs.values()])
    assert len(found.calls("dense_act_dense_inference")) == 1
    assert found.calls("dense_act_dense") == []
