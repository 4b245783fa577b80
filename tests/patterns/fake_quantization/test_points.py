"""`convert` and `FuseBackend(quantize=…)`: the same bits, gradients included, for every layer that both quantise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_pass
from fuse_pass import FuseBackend, Granularity, QuantSpec, Reason, Site, convert
from fuse_pass.nn import BitLinear, FusedDenseGELUDense, FusedDropoutLayerNorm
from fuse_pass.patterns.fake_quantization.points import LAYERS
from fuse_pass.quantization.layers import LAYER_FOR
from fuse_pass.quantization.layers.dropout import Dropping
from fuse_pass.quantization.layers.elementwise import Elementwise
from fuse_pass.report import Report
from tests.capture import capture
from tests.quantization.samples import SAMPLES, Sample

FORMATS = ("fp8_e4m3", "int8", "int4", "mxfp8", "fp4_e2m1")
# One call each, which `fuse_pass.compile` swaps for a quantised layer.
DECLINED = {nn.RNN: Reason.OPAQUE, nn.LSTM: Reason.OPAQUE, nn.GRU: Reason.OPAQUE}


def has_fixed_factor(sample: Sample) -> bool:
    """Dynamo itself refuses `momentum=None` in training, whose factor is data."""
    return not (issubclass(sample.type, nn.modules.batchnorm._BatchNorm) and sample.options.get("momentum", 0) is None)


SAME = tuple(s for s in SAMPLES if s.type not in DECLINED and 0 not in s.shapes[0] and has_fixed_factor(s))


class EveryLayer(nn.Module):
    """Each layer on inputs of its own."""

    def __init__(self, samples: tuple[Sample, ...]) -> None:
        super().__init__()
        self.samples = samples
        self.layers = nn.ModuleList(sample.layer() for sample in samples)

    def forward(self, *inputs: tuple[Tensor, ...]) -> list[Any]:
        called = zip(self.layers, inputs, self.samples, strict=True)
        # Copies, because a layer that works in place may not write into a leaf.
        return [layer(*(x.clone() for x in xs), **sample.call) for layer, xs, sample in called]


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result or () for t in tensors_of(part)]


def step(model: nn.Module, call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """All outputs, all gradients and all buffers of one training step, under one seed."""
    model.zero_grad()
    inputs = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs)
    torch.manual_seed(3)
    outputs = tensors_of(call(*inputs))
    generator = torch.Generator().manual_seed(1)
    floating = [y for y in outputs if y.is_floating_point() and y.requires_grad]
    torch.autograd.backward(floating, [torch.randn(y.shape, generator=generator).to(y.dtype) for y in floating])
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"grad of input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    found |= {f"grad of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [name for name, value in theirs.items() if not torch.equal(ours[name], value)]


def steps(
    model: nn.Module, inputs: tuple[Tensor, ...], specs: Any = FORMATS, call: Any = None
) -> dict[Any, dict[str, Tensor]]:
    """One step of the quantised graphs per spec; Dynamo reads the model once. `call(model, *inputs)` if it is given."""
    graphs: dict[Any, Callable[..., Any]] = {}
    report = Report()

    def rewrite_only(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        for spec in specs:
            fused, found = FuseBackend([], quantize=spec, strict=True).rewrite(gm)
            report.extend(found)
            graphs[spec] = fused.forward
        return lambda *arguments: graphs[chosen](*arguments)

    model, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    compiled = torch.compile(model, backend=rewrite_only, fullgraph=True)
    found = {}
    for chosen in specs:
        model.load_state_dict(state)
        found[chosen] = step(model, compiled if call is None else lambda *x: call(compiled, *x), inputs)
    assert report.declines == []
    return found


def assert_same(model: nn.Module, *inputs: Tensor, specs: Any = FORMATS, but: tuple[str, ...] = ()) -> None:
    """The same bits as `convert`, but for gradients in `but`, whose summands are added in another order."""
    ours = steps(model, inputs, specs)
    for spec in specs:
        converted = convert(model, spec)
        theirs = step(converted, converted, inputs)
        different = differences(ours[spec], theirs)
        assert [name for name in different if name not in but] == [], spec
        for name in different:
            torch.testing.assert_close(ours[spec][name], theirs[name], rtol=1e-5, atol=1e-6)


def test_every_layer_that_is_swapped_is_here_or_declined() -> None:
    elementwise = {kind for kind, layer in LAYER_FOR.items() if issubclass(layer, Elementwise)}
    dropout = {kind for kind, layer in LAYER_FOR.items() if issubclass(layer, Dropping)}
    assert set(LAYERS) == elementwise - dropout, "a row for every layer whose arithmetic is called by a module alone"
    assert {sample.type for sample in SAME} | set(DECLINED) == set(LAYER_FOR)
    assert {sample.type for sample in SAME}.isdisjoint(DECLINED)


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"])
@pytest.mark.parametrize("rest", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one each", "the others"])
@pytest.mark.parametrize("specs", [FORMATS[:2], pytest.param(FORMATS[2:], marks=pytest.mark.slow)], ids="-".join)
def test_the_bits_of_convert(training: bool, rest: bool, specs: tuple[str, ...]) -> None:
    first = {sample.type: sample for sample in reversed(SAME)}
    samples = tuple(s for s in SAME if (first[s.type] is s) is not rest)
    model = EveryLayer(samples).train(training)
    inputs = tuple(sample.inputs() for sample in samples)
    flat = tuple(x for xs in inputs for x in xs)

    def call(module: Any, *flat: Tensor) -> Any:
        pending = iter(flat)
        return module(*(tuple(next(pending) for _ in xs) for xs in inputs))

    ours = steps(model, flat, specs, call)
    for spec in specs:
        converted = convert(model, spec)
        theirs = step(converted, lambda *x, m=converted: call(m, *x), flat)
        assert differences(ours[spec], theirs) == [], spec


@pytest.mark.parametrize("kind", DECLINED)
def test_declined_layers(kind: type[nn.Module]) -> None:
    layer, x = kind(4, 3), torch.randn(2, 3, 4)
    with torch._dynamo.config.patch(allow_rnn=True):
        captured = capture(lambda x: layer(x)[0], x, backend=FuseBackend(quantize="int8", strict=True))
    assert {decline.reason for decline in captured.report.declines} == {DECLINED[kind]}
    with fuse_pass.collect() as report:
        fuse_pass.compile(nn.Sequential(layer), quantize="int8")
    assert report.counts() == {"convert": 1}


class Residual(nn.Module):
    """A convolution block as in ResNets: activations in place, a pooling with indices, two uses of one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), nn.LogSoftmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        x = self.act(x + self.second(x))
        pooled, indices = self.pool(x)
        return self.head(self.unpool(pooled, indices) + x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.act, self.dropout = nn.SiLU(), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.act(self.gate(x)) * self.up(x)))


def block(p: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Dropout(p), nn.Linear(10, 6))


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: (block(0.25), torch.randn(4, 6)),
        lambda: (nn.Sequential(block(), nn.Sigmoid(), block()), torch.randn(2, 4, 6)),
        lambda: (Gated(), torch.randn(4, 6)),
        lambda: (Residual(), torch.randn(2, 3, 4, 4)),
    ],
    ids=["dense", "nested", "gated", "residual"],
)
def test_models(make: Any, training: bool) -> None:
    model, x = make()
    assert_same(model.train(training), x)


def test_a_value_with_several_readers() -> None:
    """Only the order in which gradients of such a value are added may differ."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation=nn.GELU(), batch_first=True)
    assert_same(layer, torch.randn(2, 4, 8), but=("grad of input 0",))


SAME_EVERYWHERE = (
    QuantSpec(input="fp8_e5m2", weight="fp8_e4m3", output="bf16"),
    QuantSpec(input="int8", output="int8"),
    QuantSpec(input=Site("int8_asymmetric"), output=Site("int8_asymmetric"), weight="int4"),
    QuantSpec(input=Site("int8", granularity=Granularity("token")), bias="fp16"),
    QuantSpec(weight=Site("int4", granularity=Granularity("group", size=4))),
    QuantSpec(input=Site("fp8_e4m3", scale="dynamic"), output=Site("fp8_e4m3", scale="dynamic")),
)


def test_sites_and_granularities() -> None:
    """A scale that is taken from the tensor is taken again from the rounded one, as the next layer does it."""
    model = nn.Sequential(block(), nn.LayerNorm(6), nn.Tanh(), block(), nn.Softmax(-1), nn.AvgPool1d(2))
    assert_same(model, torch.randn(3, 4, 6), specs=SAME_EVERYWHERE)


def test_a_result_that_was_written_into_is_quantized_again() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x.view(-1).add_(0.3)
            return self.second(x)

    assert_same(Writing(), torch.randn(3, 6))


@pytest.mark.parametrize("view", [False, True])
def test_writing_into_what_others_read_declines(view: bool) -> None:
    layer, act = nn.Linear(6, 6), nn.ReLU(inplace=True)

    def others(x: Tensor) -> Tensor:
        h = layer(x)
        act(h.view(-1) if view else h)
        return h * 2

    x = torch.randn(3, 6)
    captured = capture(others, x, backend=FuseBackend(quantize="int8", strict=True))
    (decline,) = captured.report.declines
    assert (decline.reason, decline.detail) == (Reason.MUTATION, "relu writes into h, which others see")
    assert torch.equal(captured.output, convert(layer, "int8")(x).relu() * 2)


def test_functions_subclasses_and_hooks() -> None:
    """The layer is quantised, nothing else: not the function, not another type, not what a hook does beside it."""

    class Mine(nn.GELU):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mine, self.hooked = Mine(), nn.GELU()
            self.hooked.register_forward_hook(lambda module, inputs, y: torch.tanh(3 * y))

        def forward(self, x: Tensor) -> Tensor:
            return self.hooked(F.gelu(self.mine(x)).softmax(-1) - F.dropout(x, 0.5, self.training))

    model, x = Model(), torch.randn(3, 6)
    assert_same(model, x)
    captured = capture(model, x, backend=FuseBackend(quantize="int8", strict=True))
    assert [match.variant for match in captured.report.matches] == ["GELU"]


def test_a_layer_that_is_the_model_and_one_in_a_checkpoint() -> None:
    x = torch.randn(3, 6)
    for model in (nn.Softplus(), nn.MaxPool1d(2)):
        assert_same(model, x)
    act = nn.Softplus()

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(act, x, use_reentrant=False)

    captured = capture(checkpointed, x, backend=FuseBackend(quantize="int8", strict=True))
    assert torch.equal(captured.output, convert(act, "int8")(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [lambda: FusedDenseGELUDense(6, 10), lambda: FusedDropoutLayerNorm(6, 0.3)])
def test_layers_of_this_package_are_opened(make: Any, training: bool) -> None:
    """Not one call in float; and their patterns fuse what was opened."""
    model, x = nn.Sequential(make()).train(training), torch.randn(4, 6)
    assert_same(model, x)
    captured = capture(model, x, backend=FuseBackend(quantize="fp8_e4m3", strict=True))
    counts = captured.report.counts()
    is_block = isinstance(model[0], FusedDenseGELUDense)
    assert counts["dense_act_dense"] == is_block
    assert counts["dropout_norm"] == (training and not is_block)  # without dropout and residual, a norm is left alone
    assert len(captured.calls("seed")) == counts["dropout_norm"]


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (BitLinear(6, 6), torch.randn(4, 6)),
        (FusedDenseGELUDense(6, 10, has_fp16_weights=True), torch.randn(4, 6)),
        (nn.EmbeddingBag(5, 6), torch.randint(0, 5, (4, 3))),
    ],
    ids=["BitLinear", "LLM.int8", "EmbeddingBag"],
)
def test_weights_without_a_quantized_layer_are_declined(layer: nn.Module, x: Tensor) -> None:
    captured = capture(layer, x, backend=FuseBackend(quantize="int8", strict=True))
    assert {decline.reason for decline in captured.report.declines} == {Reason.NO_QUANTIZED_LAYER}
    with fuse_pass.collect() as report:
        convert(layer, "int8")
    assert {decline.reason for decline in report.declines} == {Reason.NO_QUANTIZED_LAYER}


def test_through_aot_autograd() -> None:
    model, x = nn.Sequential(block(), nn.ReLU(inplace=True), nn.AdaptiveMaxPool1d(3)), torch.randn(4, 6)
    converted, ours = convert(model, "int8"), copy.deepcopy(model)

    def rewritten(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        fused, _ = FuseBackend(quantize="int8", strict=True).rewrite(gm)
        return torch._dynamo.lookup_backend("aot_eager")(fused, example_inputs)

    theirs = step(converted, converted, (x,))
    assert differences(step(ours, torch.compile(ours, backend=rewritten), (x,)), theirs) == []


def test_through_inductor() -> None:
    """Where nothing but quantisation rounds, the compiled model has the same bits."""
    model, x = nn.Sequential(nn.ReLU(), nn.MaxPool1d(2), nn.Hardtanh()), torch.randn(2, 4, 6)
    for spec in ("int8", "mxfp8"):
        converted = convert(model, spec)
        compiled = torch.compile(model, backend=FuseBackend(quantize=spec))
        assert differences(step(model, compiled, (x,)), step(converted, converted, (x,))) == []
