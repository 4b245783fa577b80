"""Attention opened in the graph: the bits of `QuantizedMultiheadAttention`, and no others inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_pass
from fuse_pass import FuseBackend, QuantSpec, Reason, convert, fake_quantize
from tests.capture import Captured, capture
from tests.patterns.attention_forms import every_form
from tests.quantization.samples import Sample

FP8 = QuantSpec.uniform("fp8_e4m3")
EXACT = QuantSpec.uniform("fp32")


def quantized(function: Any, *inputs: Any, spec: Any = FP8, **options: Any) -> Captured:
    return capture(function, *inputs, backend=FuseBackend(quantize=spec, strict=True), fullgraph=True, **options)


def run(call: Any, inputs: tuple[Tensor, ...], layer: nn.Module) -> list[Tensor]:
    """The results and every gradient, under one seed."""
    layer.zero_grad()
    torch.manual_seed(5)
    output, weights = call(*inputs)
    grads = torch.autograd.grad(output.square().sum(), [*inputs, *layer.parameters()])
    return [output, *([] if weights is None else [weights]), *grads]


@every_form
@pytest.mark.parametrize("spec", [FP8, "int8", QuantSpec(output="int8")], ids=str)
def test_the_bits_of_convert(form: Sample, spec: Any) -> None:
    torch.manual_seed(0)
    layer = form.layer()
    converted, inputs = convert(layer, spec), form.inputs()
    captured: list[Captured] = []

    def ours(*inputs: Tensor) -> Any:
        captured.append(quantized(lambda *x: layer(*x, **form.call), *inputs, spec=spec))
        return captured[-1].output

    mine = run(ours, inputs, layer)
    theirs = run(lambda *x: converted(*x, **form.call), inputs, converted)
    assert captured[0].report.counts() == {"fake_quant": 1}
    assert captured[0].report.declines == []
    results = len(theirs) - len(inputs) - len(list(layer.parameters()))
    for a, b in zip(mine[:results], theirs[:results], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(mine[results:], theirs[results:], rtol=1e-4, atol=1e-5)


@every_form
def test_equals_pytorch_where_the_format_holds_every_value(form: Sample) -> None:
    torch.manual_seed(0)
    layer, inputs, spec = form.layer().double(), form.inputs(torch.float64), QuantSpec.uniform("fp64")
    masks = {
        name: value for name, value in form.call.items() if isinstance(value, Tensor) and value.is_floating_point()
    }
    call = {**form.call, **{name: mask.double() for name, mask in masks.items()}}
    mine = run(lambda *x: quantized(lambda *x: layer(*x, **call), *x, spec=spec).output, inputs, layer)
    theirs = run(lambda *x: layer(*x, **call), inputs, layer)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_dropout_is_that_of_pytorch(dynamic: bool, training: bool) -> None:
    layer, x = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True).train(training), torch.randn(2, 5, 8)
    converted = convert(layer, FP8)
    torch.manual_seed(3)
    captured = quantized(lambda x: layer(x, x, x), x, dynamic=dynamic)
    torch.manual_seed(3)
    for a, b in zip(captured.output, converted(x, x, x), strict=True):
        assert torch.equal(a, b)
    assert bool((captured.output[1] == 0).any()) is training


@pytest.mark.parametrize("dynamic", [False, True])
def test_operands_are_quantized_once(dynamic: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
    x = torch.randn(2, 5, 8)
    captured = quantized(
        lambda x: layer(x, x, x)[0] + layer(x, x, x)[0], x, spec=QuantSpec("fp16", "fp16", "fp16"), dynamic=dynamic
    )
    assert captured.report.counts() == {"fake_quant": 2}
    weights_and_biases = len(list(layer.parameters()))
    assert len(captured.calls("fake_quantize")) == weights_and_biases + captured.report.counts()["fake_quant"]


def test_autocast() -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    converted = convert(layer, FP8)
    with torch.autocast("cpu", torch.bfloat16):
        captured, expected = quantized(lambda x: layer(x, x, x), x), converted(x, x, x)
    for a, b in zip(captured.output, expected, strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)


def test_through_inductor() -> None:
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 6, 16, requires_grad=True)
    spec = QuantSpec.uniform("bf16")
    compiled = torch.compile(layer, backend=FuseBackend(quantize=spec), fullgraph=True)
    y = compiled(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(y, convert(layer, spec)(x, x, x, need_weights=False)[0], rtol=0.02, atol=0.02)
    assert torch.equal(y, fake_quantize(y, "bf16"))
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (x, *layer.parameters()))


def test_keys_from_outside_stay_one_call() -> None:
    layer, x, keys = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8), torch.randn(4, 5, 4)

    def call(x: Tensor) -> Tensor:
        return F.multi_head_attention_forward(
            x, x, x, 8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0, layer.out_proj.weight,
            layer.out_proj.bias, static_k=keys, static_v=keys,
        )[0]  # fmt: skip

    captured = quantized(call, x)
    (decline,) = captured.report.declines
    assert decline.reason is Reason.OPAQUE
    assert "keys or values from outside" in decline.detail
    torch.testing.assert_close(captured.output, call(x))


class ByHand(nn.Module):
    """`nn.MultiheadAttention` as models write it out, with the same parameters."""

    def __init__(self, layer: nn.MultiheadAttention, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
            for weight, bias in zip(weights, biases, strict=True)
        )
        context = F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)
        return F.linear(context, layer.out_proj.weight, layer.out_proj.bias)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_by_hand_has_the_bits_of_the_layer(is_causal: bool) -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    captured = quantized(ByHand(layer, is_causal=is_causal), x)
    assert captured.report.counts() == {"fake_quant": 5}
    mask = {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)} if is_causal else {}
    assert torch.equal(captured.output, convert(layer, FP8)(x, x, x, **mask)[0])


ALLOWED = ~torch.ones(3, 5, dtype=torch.bool).triu(2)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"scale": 0.3},
    {"attn_mask": ALLOWED},
    {"attn_mask": ALLOWED & torch.tensor([[True], [False], [True]])},
    {"attn_mask": torch.randn(2, 1, 3, 5)},
    {"dropout_p": 0.0, "attn_mask": torch.randn(3, 5)},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_option_of_dot_product_attention(options: dict[str, Any], dynamic: bool) -> None:
    q, k, v = (torch.randn(2, 4, length, 6, dtype=torch.float64, requires_grad=True) for length in (3, 5, 5))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)

    captured = quantized(call, q, k, v, spec=QuantSpec(output="fp64"), dynamic=dynamic)
    assert captured.report.counts() == {"fake_quant": 1}
    assert not [
        node for gm in captured.rewritten for node in gm.graph.nodes if node.target is F.scaled_dot_product_attention
    ]
    expected = call(q, k, v)
    assert captured.output.stride() == expected.stride()
    torch.testing.assert_close(captured.output, expected)
    grads = torch.autograd.grad(captured.output.square().sum(), (q, k, v))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)))


@pytest.mark.parametrize("shape", [(2, 3, 6), (3, 6), (2, 4, 0, 6)])
def test_ranks_and_empty_tensors(shape: tuple[int, ...]) -> None:
    q, k = torch.randn(shape), torch.randn(*shape[:-2], 5, 6)
    captured = quantized(F.scaled_dot_product_attention, q, k, k, spec=QuantSpec(output="fp32"))
    torch.testing.assert_close(captured.output, F.scaled_dot_product_attention(q, k, k))


def test_grouped_queries() -> None:
    q, k = torch.randn(2, 6, 3, 4), torch.randn(2, 2, 5, 4)

    def call(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    torch.testing.assert_close(quantized(call, q, k, spec=EXACT).output, call(q, k))


def test_dropout_of_dot_product_attention() -> None:
    q, eye = torch.zeros(64, 40, 8), torch.eye(40).expand(64, 40, 40)

    def probabilities(q: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, v, dropout_p=0.25)

    found = quantized(probabilities, q, eye, spec=QuantSpec(output="fp32")).output * 40
    kept = found != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=4 * (0.25 * 0.75 / kept.numel()) ** 0.5)
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / 0.75))


def test_probabilities_are_numbers_of_the_format() -> None:
    q, eye = torch.randn(2, 5, 8), torch.eye(5).expand(2, 5, 5)
    context = quantized(F.scaled_dot_product_attention, q, q, eye, spec=QuantSpec(output="fp4_e2m1")).output
    scores = fake_quantize((q * 8**-0.5) @ q.mT, "fp4_e2m1")
    assert torch.equal(context, fake_quantize(scores.softmax(-1), "fp4_e2m1"))
    assert not torch.equal(context, fake_quantize(F.scaled_dot_product_attention(q, q, eye), "fp4_e2m1"))


def test_without_quantized_results_the_call_stays() -> None:
    q = torch.randn(2, 5, 8)
    captured = quantized(F.scaled_dot_product_attention, q, q, q, spec="int8")
    assert captured.report.counts() == {"fake_quant": 1}
    quantized_q = fake_quantize(q, "int8")
    torch.testing.assert_close(captured.output, F.scaled_dot_product_attention(quantized_q, quantized_q, quantized_q))


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp8_e4m3", "fixed7_8", "mxfp4", "int8"])
@pytest.mark.parametrize("blocked", [-torch.inf, torch.finfo(torch.float32).min])
def test_what_is_masked_stays_out_of_formats_without_infinity(name: str, blocked: float) -> None:
    """Scores of −6 need more than fp4's most negative number as a mask, and −inf makes no scale of integers."""
    q, values = torch.full((1, 2, 8), 1.5), torch.eye(2)[None]
    mask, spec = torch.tensor([[0.0, blocked], [blocked, 0.0]]), QuantSpec(output=name)
    captured = quantized(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask), q, -q, values, spec=spec)
    assert torch.equal(captured.output, fake_quantize(values, name))


def test_a_layer_that_is_the_whole_model_is_quantized_once() -> None:
    """Its operations are in no module stack; `fuse_pass.compile` converts it, and the graph is left as it is."""
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    spec = QuantSpec(input="fp8_e4m3", weight="fp8_e4m3")
    with fuse_pass.collect() as report:
        y = fuse_pass.compile(layer, quantize=spec, fullgraph=True)(x, x, x)[0]
    assert report.counts() == {"convert": 1}
    torch.testing.assert_close(y, convert(layer, spec)(x, x, x)[0])
