"""The precision flows and activations that the seed on `torch.nn.Module` teaches, run with our backend."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fuse_pass
from fuse_pass import fuse_backend
from tests.precision import assert_as_exact_as_eager


class NeuralNetwork(nn.Module):
    def __init__(self, input_size: int = 64, hidden_size: int = 48, output_size: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_size, hidden_size)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(x)))


def data(rows: int = 100) -> tuple[Tensor, Tensor]:
    """Ten classes that a small network can tell apart."""
    labels = torch.arange(rows) % 10
    centres = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 0.3 * torch.randn(rows, 64), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inference_in_half_precision(dtype: torch.dtype) -> None:
    model, (inputs, _) = NeuralNetwork().eval(), data()
    exact = copy.deepcopy(model).to(dtype).double()(inputs.to(dtype).double())
    model.to(dtype)
    with torch.no_grad(), fuse_pass.collect() as report:
        ours = torch.compile(model, backend=fuse_backend, fullgraph=True)(inputs.to(dtype))
        eager = model(inputs.to(dtype))
    assert report.counts() == {"dense_act_dense": 1}
    assert_as_exact_as_eager(ours, eager, exact)


def train(model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], dtype: torch.dtype | None) -> list[float]:
    """Five epochs of the seed's loop; with a half type under autocast, float16 with a gradient scaler."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    inputs, labels = data()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model(inputs).float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)], ids=str)
def test_training_loop(dtype: torch.dtype | None, tolerance: float) -> None:
    torch.manual_seed(1)
    eager = NeuralNetwork()
    ours = copy.deepcopy(eager)
    torch.manual_seed(2)
    expected = train(eager, list(eager.parameters()), dtype)
    torch.manual_seed(2)
    with fuse_pass.collect() as report:
        losses = train(torch.compile(ours, backend=fuse_backend), list(ours.parameters()), dtype)
    assert report.counts() == {"dense_act_dense": 1}
    assert losses == pytest.approx(expected, rel=tolerance)
    assert losses[-1] < 0.8 * losses[0]


def test_save_and_load(tmp_path: Path) -> None:
    model, (inputs, _) = NeuralNetwork(), data()
    compiled = torch.compile(model, backend=fuse_backend)
    expected = compiled(inputs)
    torch.save(model.state_dict(), tmp_path / "model_weights.pth")
    loaded = NeuralNetwork()
    loaded.load_state_dict(torch.load(tmp_path / "model_weights.pth"))
    loaded.eval()
    torch.testing.assert_close(torch.compile(loaded, backend=fuse_backend)(inputs), expected)


def test_loading_into_a_compiled_model_is_seen() -> None:
    model, (inputs, _) = NeuralNetwork().eval(), data()
    compiled = torch.compile(model, backend=fuse_backend)
    with torch.no_grad():
        before = compiled(inputs)
        model.load_state_dict(NeuralNetwork().state_dict())
        after = compiled(inputs)
        torch.testing.assert_close(after, model(inputs))
    assert not torch.allclose(before, after)


def test_dynamic_int8() -> None:
    """Layers that Dynamo does not open (packed int8 weights) run as they are, with the rest of the model."""
    model, (inputs, _) = nn.Sequential(NeuralNetwork(), nn.LayerNorm(10)).eval(), data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(quantized, backend=fuse_backend)(inputs), quantized(inputs))


class Int4Linear(nn.Module):
    """Weight-only 4 bit with a scale per row, as libraries write it: weights are unpacked in forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = (linear.weight.detach() / scale).round().to(torch.int8) + 8
        self.register_buffer("packed", (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.packed & 15, self.packed >> 4
        weight = (torch.stack((low, high), -1).flatten(1).to(x.dtype) - 8) * self.scale
        return nn.functional.linear(x, weight, self.bias)


def test_four_bit_weights() -> None:
    model, (inputs, _) = NeuralNetwork().eval(), data()
    model.fc1, model.fc2 = Int4Linear(model.fc1), Int4Linear(model.fc2)
    with torch.no_grad(), fuse_pass.collect() as report:
        torch.testing.assert_close(torch.compile(model, backend=fuse_backend)(inputs), model(inputs))
    assert report.counts() == {"dense_act_dense": 1}


class Mish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(nn.functional.softplus(x))


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(), nn.LeakyReLU(negative_slope=0.01), nn.PReLU(num_parameters=1), nn.ELU(alpha=1.0), nn.SELU(),
        nn.GELU(), nn.SiLU(), Mish(),
    ],
    ids=lambda activation: type(activation).__name__,
)  # fmt: skip
def test_relu_and_its_alternatives(activation: nn.Module) -> None:
    model, (inputs, _) = nn.Sequential(nn.Linear(64, 24), copy.deepcopy(activation), nn.Linear(24, 10)), data()
    twin = copy.deepcopy(model)
    with fuse_pass.collect() as report:
        ours = torch.compile(twin, backend=fuse_backend, fullgraph=True)(inputs)
    assert report.counts() == {"dense_act_dense": 1}
    expected = model(inputs)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours, expected)
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_the_seed_s_chain_of_three() -> None:
    model = nn.Sequential(nn.Linear(784, 256), nn.LeakyReLU(0.01), nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 10))
    x = torch.randn(4, 784)
    with fuse_pass.collect() as report:
        torch.testing.assert_close(torch.compile(model, backend=fuse_backend)(x), model(x))
    assert report.counts() == {"dense_act_dense": 2}
