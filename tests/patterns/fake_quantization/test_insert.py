"""Fake quantisation put into graphs: the bits of `convert`, every value once, and still fused."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_pass
from fuse_pass import FuseBackend, Granularity, QuantSpec, Reason, Site, convert, fake_quantize, fuse_backend
from tests.capture import Captured, capture
from tests.packed import packed_format


class Everything(nn.Module):
    """Every layer that both `convert` and the backend reach."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.conv, self.transposed = nn.Conv1d(8, 8, 3, padding=1), nn.ConvTranspose1d(8, 8, 3)
        self.batch, self.group = nn.BatchNorm1d(8), nn.GroupNorm(2, 8)
        self.instance, self.norm = nn.InstanceNorm1d(8, affine=True), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transposed(self.conv(self.embedding(tokens).transpose(1, 2)))
        x = self.instance(self.group(self.batch(x))).transpose(1, 2)
        return self.down(F.gelu(self.up(self.norm(x))))


TOKENS = torch.arange(12).view(2, 6) % 5
FORMATS = ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "int8", "int4_asymmetric", "fixed7_8", "mxfp8_e4m3")


def quantized(function: Any, *inputs: Any, spec: Any, **options: Any) -> Captured:
    return capture(function, *inputs, backend=FuseBackend(quantize=spec, strict=True), **options)


def calls(captured: Captured) -> int:
    return len(captured.calls("fake_quantize"))


def run(model: nn.Module, call: Any) -> dict[str, Tensor]:
    model.zero_grad()
    y = call(TOKENS)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters()}, **dict(model.named_buffers())}


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_bits_of_convert(spec: str, training: bool) -> None:
    model = Everything().train(training)
    converted, ours = convert(model, spec), copy.deepcopy(model)
    report = fuse_pass.report.Report()

    def rewrite_only(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        fused, found = FuseBackend(quantize=spec, strict=True).rewrite(gm)
        report.extend(found)
        return fused.forward

    theirs = run(converted, converted)
    mine = run(ours, torch.compile(ours, backend=rewrite_only))
    assert report.counts()["fake_quant"] == 9
    assert torch.equal(mine["y"], theirs["y"])
    assert [name for name, value in theirs.items() if not torch.equal(mine[name], value)] == []


@pytest.mark.parametrize("spec", ["fp8_e4m3", "bf16", QuantSpec.uniform("fp8_e5m2", rounding="towards_zero")], ids=str)
def test_fused_with_quantized_operands(spec: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Dropout(0.0), nn.Linear(24, 8))
    x = torch.randn(5, 8, requires_grad=True)
    captured = quantized(model, x, spec=spec)
    assert captured.report.counts() == {"fake_quant": 3, "dense_act_dense": 1}
    assert "fake-quantised" in captured.report.matches[-1].variant
    converted = convert(model, spec)
    expected = converted(x)
    assert torch.equal(captured.output, expected)
    grads = torch.autograd.grad(captured.output.sum(), [x, *model.parameters()])
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), [x, *converted.parameters()]), strict=True):
        torch.testing.assert_close(a, b)


def test_fused_and_quantized_through_inductor() -> None:
    model, x = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)), torch.randn(5, 8)
    backend = FuseBackend(quantize="fp8_e4m3")
    with fuse_pass.collect() as report:
        ours = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert report.counts() == {"fake_quant": 3, "dense_act_dense": 1}
    expected = convert(model, "fp8_e4m3")(x)
    torch.testing.assert_close(ours, expected, rtol=0.13, atol=1e-3)  # a sum in another order may round to a neighbour
    assert torch.equal(ours, fake_quantize(ours, "fp8_e4m3"))
    ours.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_value_is_quantized_once() -> None:
    q, k, v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def projections(x: Tensor) -> Tensor:
        return q(x) + k(x) + v(x) + q(x)

    captured = quantized(projections, torch.randn(3, 8), spec=QuantSpec(input="fp8_e4m3", weight="fp8_e4m3"))
    assert captured.report.counts() == {"fake_quant": 4}
    assert calls(captured) == 4, "one input and three weights, of which q's is used twice"


def test_a_written_value_is_quantized_again() -> None:
    weight = torch.randn(8, 8)

    def writing(x: Tensor) -> Tensor:
        x = x * 2
        first = F.linear(x, weight)
        x.add_(1)
        return first + F.linear(x, weight)

    x = torch.randn(3, 8)
    captured = quantized(writing, x, spec=QuantSpec(input="fp8_e4m3"))
    assert calls(captured) == 2
    expected = F.linear(fake_quantize(2 * x, "fp8_e4m3"), weight)
    expected = expected + F.linear(fake_quantize(2 * x + 1, "fp8_e4m3"), weight)
    torch.testing.assert_close(captured.output, expected)


def test_a_result_is_not_quantized_twice() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    captured = quantized(model, torch.randn(3, 8), spec="fp16")
    assert calls(captured) == 1 + 2 * 3, "one input; weight, bias and output of each"


@pytest.mark.parametrize(
    ("function", "operands"),
    [
        (lambda x, y: x @ y.transpose(-1, -2), 2),
        (lambda x, y: torch.bmm(x, y.transpose(-1, -2)), 2),
        (lambda x, y: x.matmul(y.mT), 2),
        (lambda x, y: torch.einsum("bij,bkj->bik", x, y), 2),
        (lambda x, y: F.scaled_dot_product_attention(query=x, key=y, value=y), 3),
        (lambda x, y: F.rms_norm(x * y, (4,)), 1),
    ],
    ids=["matmul", "bmm", "method", "einsum", "sdpa by keyword", "rms_norm"],
)
def test_products_and_norms(function: Any, operands: int) -> None:
    captured = quantized(function, torch.randn(2, 3, 4), torch.randn(2, 3, 4), spec=QuantSpec(input="fp8_e4m3"))
    assert captured.report.counts() == {"fake_quant": 1}
    nodes = [n for gm in captured.rewritten for n in gm.graph.nodes]
    quantizing = captured.calls("fake_quantize")
    reads = Counter(a for n in nodes if n not in quantizing for a in n.all_input_nodes if a in quantizing)
    assert 1 <= len(reads) <= operands


def test_parameters_of_products_are_weights() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    head, x = Head(), torch.randn(3, 4)
    captured = quantized(head, x, spec=QuantSpec(weight="fp4_e2m1"))
    torch.testing.assert_close(captured.output, x @ fake_quantize(head.weight, "fp4_e2m1"))


def test_what_is_out_of_reach_is_reported() -> None:
    lstm, x = nn.LSTM(8, 6), torch.randn(2, 3, 8)
    with torch._dynamo.config.patch(allow_rnn=True):
        captured = quantized(lambda x: lstm(x)[0], x, spec="fp8_e4m3")
    (decline,) = captured.report.declines
    assert (decline.pattern, decline.reason) == ("fake_quant", Reason.OPAQUE)
    assert "fuse_pass.convert opens it" in decline.detail.replace("`", "")
    torch.testing.assert_close(captured.output, lstm(x)[0])


def test_stochastic_rounding_respects_fallback_random() -> None:
    spec = QuantSpec.uniform("fp8_e4m3", rounding="stoc_prop")
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    captured = quantized(layer, x, spec=spec, own_random_numbers=False)
    assert [decline.reason for decline in captured.report.declines] == [Reason.FALLBACK_RANDOM]
    assert torch.equal(captured.output, layer(x))
    assert quantized(layer, x, spec=spec).report.counts() == {"fake_quant": 1}


@pytest.mark.parametrize("dynamic", [False, True])
def test_dynamic_shapes(dynamic: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    x = torch.randn(5, 8)
    captured = quantized(model, x, spec="fp8_e4m3", dynamic=dynamic)
    assert captured.report.counts() == {"fake_quant": 3, "dense_act_dense": 1}
    assert torch.equal(captured.output, convert(model, "fp8_e4m3")(x))


def test_a_failure_raises_because_other_numbers_are_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("broken insertion")

    monkeypatch.setattr("fuse_pass.patterns.fake_quantization.inserter.Inserter.once", fail)
    with pytest.raises(Exception, match="broken insertion"):
        torch.compile(nn.Linear(3, 4), backend=FuseBackend(quantize="fp16"))(torch.randn(2, 3))


def test_configuration() -> None:
    assert FuseBackend(quantize="fp16") == FuseBackend(quantize=QuantSpec.uniform("fp16"))
    assert FuseBackend(quantize="fp16") != fuse_backend
    assert hash(FuseBackend(quantize="fp16")) == hash(FuseBackend(quantize="fp16"))
    assert FuseBackend(quantize=QuantSpec(input=Site("int8"))).options.quantize.input.format.name == "int8"
    with pytest.raises(ValueError, match="unknown format 'fp17'"):
        FuseBackend(quantize="fp17")
    with pytest.raises(ValueError, match="gradients are quantised in layers only"):
        FuseBackend(quantize=QuantSpec(grad="fp8_e5m2"))
    with pytest.raises(ValueError, match="a static scale belongs to a layer"):
        FuseBackend(quantize=QuantSpec(input=Site("int8", scale="static")))
    with pytest.raises(ValueError, match="unknown format 'fp17'"):
        fuse_pass.compile(nn.Linear(3, 4), quantize="fp17")


def test_the_op_s_gradients_with_quantized_interior() -> None:
    """Straight through both quantisations: the formula by hand."""
    x, w1, w2 = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (6, 4), (5, 6)))
    settings = packed_format(5, 2, 15, "ieee", "nearest", True, "ieee")
    y = torch.ops.fuse_pass.dense_act_dense(x, w1, None, w2, None, None, None, 0.0, "silu", [], settings, settings)[0]
    grads = torch.autograd.grad(y.sum(), (x, w1, w2))
    h = x @ w1.T
    seen = fake_quantize(h, "fp8_e5m2")
    a = fake_quantize(F.silu(seen), "fp8_e5m2")
    torch.testing.assert_close(y, a @ w2.T)
    torch.testing.assert_close(grads, torch.autograd.grad((a @ w2.T).sum(), (x, w1, w2)))


WEIGHT = torch.randn(8, 8)


def branch(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: F.linear(x, WEIGHT), lambda x: F.linear(-x, WEIGHT), (x,))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (branch, Reason.HIGHER_ORDER),
        (lambda x: torch.func.vmap(lambda row: F.linear(row, WEIGHT))(x), Reason.FUNCTORCH),
        (lambda x: F.linear(x.long(), WEIGHT.long()), Reason.DTYPES),
    ],
    ids=["higher-order op", "vmap", "integers"],
)
def test_declines(function: Any, reason: Reason) -> None:
    x = torch.randn(3, 8)
    captured = quantized(function, x, spec="fp8_e4m3")
    assert captured.report.counts() == {}
    assert {decline.reason for decline in captured.report.declines} == {reason}
    torch.testing.assert_close(captured.output, function(x))


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 2, 3, 8), (0, 8)])
def test_contexts_and_ranks(context: Any, shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)), torch.randn(shape)
    converted = convert(model, "fp8_e4m3")
    with context():
        captured, expected = quantized(model, x, spec="fp8_e4m3"), converted(x)
    assert captured.report.counts() == {"fake_quant": 3, "dense_act_dense": 1}
    assert captured.output.dtype is expected.dtype
    assert torch.equal(captured.output, expected)


def test_bodies_of_checkpoints_and_frozen_weights() -> None:
    model, x = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)), torch.randn(3, 8)
    model[0].requires_grad_(False)
    converted = convert(model, "fp8_e4m3")

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    captured = quantized(checkpointed, x, spec="fp8_e4m3")
    assert captured.report.counts() == {"fake_quant": 3, "dense_act_dense": 1}
    assert torch.equal(captured.output, converted(x))
    captured.output.sum().backward()
    converted(x).sum().backward()
    assert model[0].weight.grad is None
    torch.testing.assert_close(model[2].weight.grad, converted[2].weight.grad)


# Every kind of format and every way in which a scale is found.
KINDS: dict[str, Any] = {
    "float": "fp8_e4m3",
    "fixed point": "fixed7_8",
    "block": "mxfp8",
    "block of integers": "mxint8",
    "integer": "int8",
    "asymmetric integer": "int4_asymmetric",
    "scaled float": QuantSpec(*[Site("fp8_e4m3", scale="dynamic")] * 3),
    "clipped": QuantSpec(*[Site("int4", clip_grad=True)] * 2),
    "grouped": QuantSpec(*[Site("int4", granularity=Granularity("group", size=4))] * 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_convert(kind: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8, bias=False)), torch.randn(5, 8, requires_grad=True)
    found = quantized(model, x, spec=KINDS[kind])
    assert found.report.counts()["fake_quant"] == 2
    converted = convert(model, KINDS[kind], inplace=True)
    weights = torch.linspace(-1, 1, 40).view(5, 8)
    outputs = found.output, converted(x)
    mine, theirs = (torch.autograd.grad(y, (x, *model.parameters()), weights) for y in outputs)
    assert torch.equal(*outputs)
    assert all(map(torch.equal, mine, theirs))
