"""Every quantised layer: equal to `torch.nn` where the format holds every value, exact where it does not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fuse_pass import nn as fuse_nn
from fuse_pass.numerics.formats import FloatFormat
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.quantization.functional import fake_quantize
from fuse_pass.quantization.layers import LAYER_FOR, QuantizedLayer
from tests.quantization.samples import SAMPLES, Sample

EXACT = QuantSpec.uniform("fp32")  # holds every float32
NARROW = QuantSpec.uniform("fp8_e5m2")
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)

every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
every_layer = pytest.mark.parametrize(
    "sample", {s.type: s for s in reversed(SAMPLES)}.values(), ids=lambda sample: sample.type.__name__
)


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result or () for t in tensors_of(part)]


def run(layer: nn.Module, inputs: tuple[Tensor, ...], call: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, all gradients and all buffers after one training step."""
    torch.manual_seed(3)
    layer.zero_grad()
    inputs = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs)
    # Copies, because a layer that works in place may not write into a leaf.
    outputs = tensors_of(layer(*(x.clone() for x in inputs), **call))
    floating = [y for y in outputs if y.is_floating_point() and y.requires_grad]
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(floating, [torch.randn(y.shape, generator=generator).to(y.dtype) for y in floating])
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"grad of input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    found |= {f"grad {name}": p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], sample: Sample) -> None:
    assert ours.keys() == theirs.keys()
    exact = sample.type not in (*RECURRENT, nn.MultiheadAttention)  # these two are sums in another order
    for name, value in theirs.items():
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(
            ours[name], value, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}", **tolerance
        )


@every_sample
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_torch_where_the_format_holds_every_value(sample: Sample, training: bool) -> None:
    torch.manual_seed(0)
    layer, inputs = sample.layer().train(training), sample.inputs()
    quantized = LAYER_FOR[sample.type].from_float(copy.deepcopy(layer), EXACT)
    assert quantized.training is training
    assert_equal(run(quantized, inputs, sample.call), run(layer, inputs, sample.call), sample)


@every_sample
def test_goes_to_quantized_and_back(sample: Sample) -> None:
    layer = sample.layer()
    quantized = LAYER_FOR[sample.type].from_float(layer, NARROW)
    back = quantized.to_float()
    assert type(back) is sample.type
    assert not hasattr(back, "spec")
    for other in (quantized, back):
        assert list(other.state_dict()) == list(layer.state_dict())
        assert all(a is b for a, b in zip(other.parameters(), layer.parameters(), strict=True)), "the same parameters"
    assert layer.load_state_dict(quantized.state_dict()).missing_keys == []
    other = LAYER_FOR[sample.type].from_float(sample.layer(), NARROW)
    other.load_state_dict(layer.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value, layer.state_dict()[name]), name
    inputs = sample.inputs()
    twin = copy.deepcopy(back)  # the two share their statistics
    assert_equal(run(twin, inputs, sample.call), run(layer, inputs, sample.call), sample)


@every_layer
def test_a_narrow_format_changes_the_result_and_gradients_flow(sample: Sample) -> None:
    torch.manual_seed(0)
    layer, inputs = sample.layer(), sample.inputs()
    quantized = LAYER_FOR[sample.type].from_float(copy.deepcopy(layer), NARROW)
    ours, theirs = run(quantized, inputs, sample.call), run(layer, inputs, sample.call)
    assert ours.keys() == theirs.keys(), "every parameter still gets a gradient"
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs if name.startswith("output"))
    assert all(torch.isfinite(value).all() for name, value in ours.items() if name.startswith("grad"))


@every_layer
def test_outputs_are_numbers_of_the_format(sample: Sample) -> None:
    torch.manual_seed(0)
    quantized = LAYER_FOR[sample.type].from_float(sample.layer(), NARROW)
    result = quantized(*sample.inputs(), **sample.call)
    y = result[0] if isinstance(result, tuple) else result
    assert torch.equal(y, fake_quantize(y, "fp8_e5m2"))


@every_layer
def test_copies_and_pickles(sample: Sample) -> None:
    quantized = LAYER_FOR[sample.type].from_float(sample.layer(), NARROW).eval()
    inputs = sample.inputs()
    expected = tensors_of(quantized(*inputs, **sample.call))
    for twin in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert twin.spec == quantized.spec
        for a, b in zip(tensors_of(twin(*inputs, **sample.call)), expected, strict=True):
            assert torch.equal(a, b)
    wide = copy.deepcopy(quantized).to(torch.float64)
    assert all(p.dtype is torch.float64 for p in wide.parameters())
    assert all(t.is_meta for t in copy.deepcopy(quantized).to("meta").state_dict().values())
    assert "fp8_e5m2" in repr(quantized)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_every_layer_with_parameters_trains_data_parallel() -> None:
    for sample in {s.type: s for s in reversed(SAMPLES)}.values():
        torch.manual_seed(0)
        alone, inputs = LAYER_FOR[sample.type].from_float(sample.layer(), NARROW), sample.inputs()
        if not list(alone.parameters()):
            continue  # which DistributedDataParallel refuses
        twin = copy.deepcopy(alone)
        run(DistributedDataParallel(twin), inputs, sample.call)
        run(alone, inputs, sample.call)
        for (name, a), b in zip(twin.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), f"{sample.id}: {name}"


@every_layer
@pytest.mark.parametrize("rounding", ["nearest", "towards_zero"])
def test_compiles_whole_and_equals_eager(sample: Sample, rounding: str) -> None:
    """Captured without a graph break; the traced graph, run by itself, gives the same bits."""
    torch.manual_seed(0)
    spec = QuantSpec.uniform("fp8_e4m3", rounding=rounding)
    quantized = LAYER_FOR[sample.type].from_float(sample.layer(), spec).eval()
    inputs = sample.inputs()
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    expected = tensors_of(quantized(*inputs, **sample.call))
    for a, b in zip(tensors_of(compiled(*inputs, **sample.call)), expected, strict=True):
        assert torch.equal(a, b)


@every_layer
@pytest.mark.parametrize("spec", [NARROW, QuantSpec.uniform("int8"), QuantSpec.uniform("mxfp4")], ids=str)
def test_zeros_have_a_scale(sample: Sample, spec: QuantSpec) -> None:
    """All-zero weights and inputs, from which no scale follows: no NaN, and zeros where the layer gives zeros."""
    layer = sample.layer().eval()
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    inputs = tuple(x.new_zeros(x.shape) for x in sample.inputs())
    quantized = LAYER_FOR[sample.type].from_float(copy.deepcopy(layer), spec)
    ours, theirs = (tensors_of(model(*inputs, **sample.call)) for model in (quantized, layer))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a == 0, b == 0)


def test_only_the_exact_type_is_accepted() -> None:
    class Special(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"QuantizedLinear.from_float: expected a Linear, got a Special"):
        LAYER_FOR[nn.Linear].from_float(Special(3, 4), NARROW)


@pytest.mark.parametrize(
    ("build", "inputs", "shapes"),
    [
        (lambda: fuse_nn.QuantizedLinear(10, 5, exp_bits=5, sig_bits=10, rmode=1), [(2, 10)], [(2, 5)]),
        (
            lambda: fuse_nn.QuantizedMultiheadAttention(512, 8, exp_bits=5, sig_bits=10),
            [(2, 10, 512)] * 3,
            [(2, 10, 512), (2, 10, 10)],
        ),
        (
            lambda: fuse_nn.QuantizedLinearNorm(512, exp_bits=5, sig_bits=10, rmode="towards_zero"),
            [(2, 10, 512)],
            [(2, 10, 512)],
        ),
        (lambda: fuse_nn.QuantizedConv2d(3, 16, 3, exp_bits=5, sig_bits=10), [(2, 3, 32, 32)], [(2, 16, 30, 30)]),
        (lambda: fuse_nn.QuantizedRNN(10, 20, exp_bits=5, sig_bits=10), [(2, 5, 10)], [(2, 5, 20), (1, 2, 20)]),
        (
            lambda: fuse_nn.QuantizedLSTM(10, 20, exp_bits=5, sig_bits=10),
            [(2, 5, 10)],
            [(2, 5, 20), (1, 2, 20), (1, 2, 20)],
        ),
        (lambda: fuse_nn.QuantizedGRU(10, 20, exp_bits=5, sig_bits=10), [(2, 5, 10)], [(2, 5, 20), (1, 2, 20)]),
        (lambda: fuse_nn.QuantizedBatchNorm2d(3, exp_bits=5, sig_bits=10), [(2, 3, 32, 32)], [(2, 3, 32, 32)]),
    ],
    ids=["Linear", "MultiheadAttention", "LinearNorm", "Conv2d", "RNN", "LSTM", "GRU", "BatchNorm2d"],
)
def test_examples_of_the_seed(build: Any, inputs: list[tuple[int, ...]], shapes: list[tuple[int, ...]]) -> None:
    results = tensors_of(build()(*(torch.randn(shape) for shape in inputs)))
    assert [tuple(y.shape) for y in results] == shapes


def test_linear_arithmetic_is_that_of_its_quantized_parts() -> None:
    layer = fuse_nn.QuantizedLinear(6, 10, 4, 3, rmode="plus_inf")
    x, fmt = torch.randn(3, 6), FloatFormat(4, 3)

    def rounded(value: Tensor) -> Tensor:
        return fake_quantize(value, fmt, rounding="plus_inf")

    expected = rounded(F.linear(rounded(x), rounded(layer.weight), rounded(layer.bias)))
    assert torch.equal(layer(x), expected)


def test_gradients_can_be_quantized() -> None:
    layer = fuse_nn.QuantizedLinear(6, 10, spec=QuantSpec(grad="fp8_e5m2"))
    x = torch.randn(3, 6, requires_grad=True)
    grad = torch.randn(3, 10)
    layer(x).backward(grad)
    assert torch.equal(x.grad, fake_quantize(grad, "fp8_e5m2") @ layer.weight)


def test_integer_weights_have_a_scale_per_output_channel() -> None:
    layer = LAYER_FOR[nn.Linear].from_float(nn.Linear(6, 10), QuantSpec.uniform("int8"))
    with torch.no_grad():
        layer.weight[0] *= 100
    weight = layer._weight(layer.weight)
    step = layer.weight.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(weight, torch.round(layer.weight / step) * step)


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(kind: type[nn.Module], enforce_sorted: bool) -> None:
    lengths = torch.tensor([5, 4, 2] if enforce_sorted else [2, 5, 4])
    layer = kind(4, 6, 2, batch_first=True, bidirectional=True)
    quantized = LAYER_FOR[kind].from_float(layer, EXACT)
    x = torch.randn(3, 5, 4, requires_grad=True)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    (expected, expected_state), (ours, state) = layer(packed), quantized(packed)
    for a, b in ((ours, expected),):
        torch.testing.assert_close(pad_packed_sequence(a)[0], pad_packed_sequence(b)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tensors_of(state), tensors_of(expected_state), rtol=1e-5, atol=1e-6)
    ours.data.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(p.grad is not None for p in quantized.parameters())


@pytest.mark.parametrize("kind", RECURRENT)
def test_initial_state_is_used_and_checked(kind: type[nn.Module]) -> None:
    layer = kind(4, 6, batch_first=True)
    quantized = LAYER_FOR[kind].from_float(layer, EXACT)
    h = torch.randn(1, 3, 6)
    hx = (h, torch.randn(1, 3, 6)) if kind is nn.LSTM else h
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(tensors_of(quantized(x, hx)), tensors_of(layer(x, hx)), rtol=1e-5, atol=1e-6)
    wrong = torch.randn(1, 2, 6)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        quantized(x, (wrong, wrong) if kind is nn.LSTM else wrong)
    with pytest.raises(RuntimeError, match=r"input.size"):
        quantized(torch.randn(3, 5, 9))


@pytest.mark.parametrize("kind", RECURRENT)
def test_the_state_is_quantized_at_every_step(kind: type[nn.Module]) -> None:
    spec = QuantSpec(state="fp8_e4m3")
    quantized = LAYER_FOR[kind].from_float(kind(4, 6, batch_first=True), spec)
    x = torch.randn(2, 3, 4)
    whole, final = quantized(x)
    state: Any = None
    for t in range(3):
        step, state = quantized(x[:, t : t + 1], state)
        torch.testing.assert_close(step[:, 0], whole[:, t], rtol=1e-6, atol=1e-6)
    for value in tensors_of(final):
        assert torch.equal(value, fake_quantize(value, "fp8_e4m3"))


def test_attention_masks_and_weights() -> None:
    attention = fuse_nn.QuantizedMultiheadAttention(8, 2, spec=EXACT).eval()
    q, k = torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    mask = torch.zeros(4, 5).masked_fill(torch.ones(4, 5).triu(1).bool(), -torch.inf)
    _, weights = attention(q, k, k, attn_mask=mask)
    assert weights.shape == (2, 4, 5)
    assert torch.equal(weights.triu(1), torch.zeros(2, 4, 5))
    assert attention(q, k, k, need_weights=False)[1] is None
    assert attention(q, k, k, average_attn_weights=False)[1].shape == (2, 2, 4, 5)
    with pytest.raises(RuntimeError, match="attn_mask"):
        attention(q, k, k, attn_mask=torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        attention(q, k, k, is_causal=True)


def test_sequences_of_padding_alone() -> None:
    """Nothing to attend to: as in PyTorch NaN with weights, the bias of the output without."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    quantized = LAYER_FOR[nn.MultiheadAttention].from_float(attention, EXACT)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [False] * 5])
    for need_weights in (True, False):
        (ours, _), (theirs, _) = (
            layer(x, x, x, key_padding_mask=padding, need_weights=need_weights) for layer in (quantized, attention)
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert bool(ours.isnan().any()) is need_weights
    with pytest.raises(RuntimeError, match="key_padding_mask: expected shape"):
        quantized(x, x, x, key_padding_mask=padding[:1])


def test_every_site_can_be_switched() -> None:
    x = torch.randn(3, 6)
    float_layer = nn.Linear(6, 10)
    results = []
    for site in ("input", "weight", "bias", "output"):
        layer = LAYER_FOR[nn.Linear].from_float(float_layer, QuantSpec(**{site: "fp4_e2m1"}))
        results.append(layer(x))
    nothing = LAYER_FOR[nn.Linear].from_float(float_layer, QuantSpec())
    assert torch.equal(nothing(x), float_layer(x))
    for i, y in enumerate(results):
        assert not torch.equal(y, float_layer(x))
        assert all(not torch.equal(y, other) for other in results[i + 1 :])


def test_specs_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown format 'fp7'"):
        QuantSpec.uniform("fp7")
    with pytest.raises(TypeError, match=r"QuantSpec.weight: expected a format"):
        QuantSpec(weight=8)
    with pytest.raises(ValueError, match="rounding"):
        QuantSpec.uniform("fp16", rounding="upwards")
    with pytest.raises(ValueError, match="exp_bits"):
        fuse_nn.QuantizedLinear(3, 4, 1, 10)
    assert QuantSpec(input="fp16").input == Site("fp16")


def test_isinstance_of_the_torch_layer() -> None:
    for float_type, layer in LAYER_FOR.items():
        assert issubclass(layer, QuantizedLayer)
        assert issubclass(layer, nn.RNNBase if float_type in RECURRENT else float_type)
