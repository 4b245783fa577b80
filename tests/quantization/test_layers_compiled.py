"""Every quantised layer in every rounding mode, compiled: captured whole, and the same bits as eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fuse_pass.numerics.rounding import ROUNDINGS, STOCHASTIC
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.quantization.functional import fake_quantize, quantize_at
from fuse_pass.quantization.layers import (
    LAYER_FOR,
    QuantizedBatchNorm1d,
    QuantizedGRU,
    QuantizedLSTM,
    QuantizedRNN,
    base,
    embedding,
)
from tests.quantization.samples import SAMPLES, Sample

FORMAT = "fp8_e4m3"
MODES = tuple(range(10))
DETERMINISTIC = tuple(mode for mode in MODES if ROUNDINGS[mode] not in STOCHASTIC)
RANDOM = tuple(mode for mode in MODES if ROUNDINGS[mode] in STOCHASTIC)
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)

# Layers whose arithmetic between the sites is exact or has one order only, and such that sum.
EXACT_THROUGH_INDUCTOR = (nn.LeakyReLU, nn.Hardswish, nn.Embedding, nn.MaxPool2d)
THROUGH_INDUCTOR = (*EXACT_THROUGH_INDUCTOR, nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Softmax, nn.RNN)


def shorter(sample: Sample) -> Sample:
    """Two steps of a recurrent layer are enough to have a state that is used."""
    if sample.type not in RECURRENT:
        return sample
    (shape,) = sample.shapes
    steps = len(shape) - 2 if sample.options.get("batch_first") else 0
    return replace(sample, shapes=((*shape[:steps], 2, *shape[steps + 1 :]),))


FIRST = {sample.type: shorter(sample) for sample in reversed(SAMPLES)}
OTHERS = [shorter(s) for i, s in enumerate(SAMPLES) if any(s.type is earlier.type for earlier in SAMPLES[:i])]
every_layer = pytest.mark.parametrize("sample", list(FIRST.values()), ids=lambda sample: sample.id)
every_other_sample = pytest.mark.parametrize("sample", OTHERS, ids=lambda sample: sample.id)

Results = list[dict[str, Tensor]]


class InModes(nn.Module):
    """The same layer once per rounding mode, each with parameters of its own: one compilation for all of them."""

    def __init__(self, sample: Sample, modes: tuple[int, ...] = MODES) -> None:
        super().__init__()
        layer = sample.layer()
        self.call = sample.call
        self.layers = nn.ModuleList()
        for mode in modes:
            spec = QuantSpec.uniform(FORMAT, rounding=mode)
            self.layers.append(LAYER_FOR[sample.type].from_float(copy.deepcopy(layer), spec))

    def forward(self, inputs: list[tuple[Tensor, ...]]) -> list[Any]:
        return [layer(*own, **self.call) for layer, own in zip(self.layers, inputs, strict=True)]


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result or () for t in tensors_of(part)]


def step(layers: nn.ModuleList, forward: Callable[..., list[Any]], inputs: tuple[Tensor, ...]) -> Results:
    """Outputs, all gradients and all buffers of one training step, for every layer."""
    torch.manual_seed(3)
    leaves = [tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs) for _ in layers]
    results = [tensors_of(result) for result in forward([tuple(x.clone() for x in own) for own in leaves])]
    floating = [y for outputs in results for y in outputs if y.requires_grad]
    generator = torch.Generator().manual_seed(1)
    once = [torch.randn(y.shape, generator=generator) for y in floating[: len(floating) // len(layers)]]
    torch.autograd.backward(floating, once * len(layers))
    found: Results = []
    for layer, own, outputs in zip(layers, leaves, results, strict=True):
        of_layer = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        of_layer |= {f"grad of input {i}": x.grad for i, x in enumerate(own) if x.grad is not None}
        of_layer |= {f"grad {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
        found.append(of_layer | dict(layer.named_buffers()))
    return found


def differences(ours: Results, theirs: Results, modes: tuple[int, ...] = MODES) -> list[str]:
    return [
        f"{ROUNDINGS[mode]}: {name}"
        for mode, a, b in zip(modes, ours, theirs, strict=True)
        for name in {**a, **b}
        if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]


@every_layer
def test_every_mode_compiles_whole_and_equals_eager(sample: Sample) -> None:
    """Without a graph break; the traced forward and backward graphs give the bits of eager."""
    eager, inputs = InModes(sample), sample.inputs()
    compiled = copy.deepcopy(eager)
    expected = step(eager.layers, eager, inputs)
    got = step(compiled.layers, torch.compile(compiled, backend="aot_eager", fullgraph=True), inputs)
    assert not [text for text in differences(got, expected) if not text.startswith(STOCHASTIC)]
    for found in (*got, *expected):
        y = found["output 0"]
        assert torch.equal(y, fake_quantize(y, FORMAT)), "numbers of the format"
        assert all(torch.isfinite(value).all() for value in found.values())


@every_other_sample
def test_every_configuration_compiles_whole_and_equals_eager(sample: Sample) -> None:
    eager, inputs = InModes(sample, (1,)), sample.inputs()
    compiled = copy.deepcopy(eager)
    expected = step(eager.layers, eager, inputs)
    got = step(compiled.layers, torch.compile(compiled, backend="aot_eager", fullgraph=True), inputs)
    assert differences(got, expected, (1,)) == []


def test_cumulative_statistics_need_no_second_compilation() -> None:
    """`momentum=None`, with which `nn.BatchNorm1d` itself cannot be captured whole."""
    eager = QuantizedBatchNorm1d(6, momentum=None)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            x = torch.randn(7, 6) * 3 + 1
            assert torch.equal(compiled(x), eager(x))
    assert twin.num_batches_tracked == 4
    torch.testing.assert_close(twin.state_dict(), eager.state_dict(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.ReLU6, nn.GRU])
def test_random_modes_follow_the_seed_as_in_eager(kind: type[nn.Module]) -> None:
    sample = FIRST[kind]
    eager, inputs = InModes(sample, RANDOM), sample.inputs()
    compiled = copy.deepcopy(eager)
    expected = step(eager.layers, eager, inputs)
    got = step(compiled.layers, torch.compile(compiled, backend="aot_eager", fullgraph=True), inputs)
    assert differences(got, expected, RANDOM) == []


def test_pure_sites_through_inductor() -> None:
    """Generated code has the bits of eager where nothing but quantisation can round; random sites are independent."""
    modes = DETERMINISTIC + RANDOM * 2
    eager, inputs = InModes(FIRST[nn.ReLU], modes), (torch.randn(50, 40).requires_grad_(),)
    expected = step(eager.layers, eager, inputs)
    compiled = torch.compile(eager, fullgraph=True)
    got, again = (step(eager.layers, compiled, inputs) for _ in range(2))
    known = len(DETERMINISTIC)
    assert differences(got[:known], expected[:known], DETERMINISTIC) == []
    assert differences(got, again, modes) == [], "a seed repeats"
    outputs = [found["output 0"] for found in got[known:]]
    for i, y in enumerate(outputs):
        assert torch.equal(y, fake_quantize(y, FORMAT))
        assert not any(torch.equal(y, other) for other in outputs[:i])


@pytest.mark.slow
@pytest.mark.parametrize("sample", [FIRST[kind] for kind in THROUGH_INDUCTOR], ids=lambda sample: sample.id)
def test_layers_through_inductor(sample: Sample) -> None:
    """Outputs, on the format's grid, are those of eager; elsewhere Inductor's order of float sums is visible."""
    eager, inputs = InModes(sample, DETERMINISTIC), sample.inputs()
    compiled = copy.deepcopy(eager)
    expected = step(eager.layers, eager, inputs)
    got = step(compiled.layers, torch.compile(compiled, fullgraph=True), inputs)
    different = differences(got, expected, DETERMINISTIC)
    assert not [text for text in different if "output" in text]
    assert different == [] or sample.type not in EXACT_THROUGH_INDUCTOR
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class StraightThrough(torch.autograd.Function):
    """The definition: any rounding in forward, the identity in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def by_definition(site: Site | None, x: Tensor, *qparams: Tensor | None) -> Tensor:
    result: Tensor = StraightThrough.apply(x, quantize_at(site, x.detach(), *qparams))
    return result


@every_layer
def test_gradients_are_straight_through_in_every_mode(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, inputs = InModes(sample), sample.inputs()
    theirs = copy.deepcopy(ours)
    got = step(ours.layers, ours, inputs)
    for module in (base, embedding):
        monkeypatch.setattr(module, "quantize_at", by_definition)
    assert differences(got, step(theirs.layers, theirs, inputs)) == []
    assert any(bool(value.any()) for found in got for name, value in found.items() if name.startswith("grad"))


@pytest.mark.parametrize("mode", [1, 5])
@pytest.mark.parametrize("kind", [QuantizedRNN, QuantizedLSTM, QuantizedGRU])
def test_packed_sequences_train(kind: type[nn.Module], mode: int) -> None:
    """Two layers, both directions: does a sequence of any length begin above zero?"""
    spec = replace(QuantSpec.uniform(FORMAT, rounding=mode), grad=Site("fp8_e5m2", rounding=ROUNDINGS[mode]))
    recurrent, head = kind(3, 8, num_layers=2, bidirectional=True, spec=spec), nn.Linear(16, 1)
    x, lengths = torch.randn(32, 6, 3), torch.arange(32) % 6 + 1
    wanted = (x[:, :1, 0] > 0).float()
    parameters = [*recurrent.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    losses = []
    for _ in range(30):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(recurrent(packed)[0], batch_first=True)
        last = y[torch.arange(32), lengths - 1]
        loss = F.binary_cross_entropy_with_logits(head(last), wanted)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize("kind", [QuantizedRNN, QuantizedLSTM, QuantizedGRU])
def test_packed_sequences_compile_with_graph_breaks(kind: type[nn.Module]) -> None:
    eager = kind(3, 8, num_layers=2, bidirectional=True, spec=QuantSpec.uniform(FORMAT))
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager")
    for lengths in ([3, 1, 2], [2, 2, 1]):
        x = torch.randn(3, max(lengths), 3)
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        (ours, state), (expected, expected_state) = compiled(packed), eager(packed)
        assert torch.equal(ours.data, expected.data)
        assert torch.equal(ours.unsorted_indices, expected.unsorted_indices)
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(expected_state), strict=True))
        ours.data.sum().backward()
        expected.data.sum().backward()
        for a, b in zip(twin.parameters(), eager.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="data-dependent"):
        torch.compile(eager, backend="aot_eager", fullgraph=True)(packed)
