"""dropout → [add] → norm with fake-quantised operands: found, and equal to the quantised graph that is not fused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass import FuseBackend, QuantSpec, Reason, Site
from fuse_pass.quantization.functional import fake_quantize
from tests.capture import Captured, capture
from tests.patterns.truth import SEED, SameDropout


class Block(nn.Module):
    """Two residual branches, with the norm after the sum or before the next branch."""

    def __init__(self, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layer_norm, self.rms_norm = nn.LayerNorm(8), nn.RMSNorm(8)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.first(x))
        y = self.layer_norm(x)
        x = (x if self.pre_norm else y) + self.second(y)
        y = self.rms_norm(x)
        return x + y if self.pre_norm else y


X = torch.linspace(-2, 2, 120).view(3, 5, 8)


def run(block: nn.Module, backend: FuseBackend) -> tuple[Captured, dict[str, Tensor]]:
    block = copy.deepcopy(block)
    x = X.clone().requires_grad_()
    torch.manual_seed(SEED)
    captured = capture(block, x, backend=backend)
    captured.output.backward(X)
    return captured, {"y": captured.output, "x": x.grad, **{n: p.grad for n, p in block.named_parameters()}}


@pytest.mark.parametrize("spec", ["fp8_e4m3", "fp8_e5m2", "fp16", QuantSpec(input="bf16", weight="fp8_e4m3")], ids=str)
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_found_and_equal_to_the_unfused_graph(spec: Any, pre_norm: bool, training: bool) -> None:
    torch.manual_seed(0)
    block = Block(pre_norm).train(training)
    fused, ours = run(block, FuseBackend(quantize=spec, strict=True))
    with SameDropout():
        unfused, theirs = run(block, FuseBackend([], quantize=spec, strict=True))
    assert fused.report.counts() == {"fake_quant": 4, "dropout_norm": 2}, str(fused.report)
    assert fused.report.declines == []
    assert unfused.report.counts() == {"fake_quant": 4}
    for name, value in theirs.items():
        # A rounding of the norm may tip a quantised output over to its neighbour, in a few places.
        off = (ours[name] - value).abs() > 1e-5 * value.abs().max()
        assert off.float().mean() <= 0.02, name


@pytest.mark.parametrize("pre_norm", [False, True])
def test_one_quantized_sum_inside_each_op_and_the_parameters_outside(pre_norm: bool) -> None:
    fused, _ = run(Block(pre_norm), FuseBackend(quantize=QuantSpec(input="fp8_e4m3", weight="fp16"), strict=True))
    nodes = fused.calls("dropout_norm")
    assert [len(node.args[11]) for node in nodes] == [7, 7]
    quantized = fused.calls("fake_quantize")
    assert all(node.args[2] in quantized for node in nodes)  # the weight
    assert not any(node.args[0] in quantized for node in nodes)


@pytest.mark.parametrize(
    "spec",
    [
        "int8",
        "mxfp8_e4m3",
        QuantSpec.uniform("fp8_e4m3", rounding="stoc_prop"),
        QuantSpec(input=Site("fp8_e4m3", clip_grad=True)),
        QuantSpec(input=Site("fp8_e4m3", scale="dynamic")),
    ],
    ids=["integers", "blocks", "random", "clipped", "scaled"],
)
def test_other_quantizations_decline(spec: Any) -> None:
    block, x = nn.Sequential(nn.LayerNorm(32)), torch.randn(3, 32)
    captured = capture(lambda x: block(x + 1.5 * x), x, backend=FuseBackend(quantize=spec, strict=True))
    assert captured.report.counts() == {"fake_quant": 1}
    assert [decline.reason for decline in captured.report.declines] == [Reason.QUANTIZATION]
    assert "quantize" in captured.report.declines[0].node or "straight" in captured.report.declines[0].node


def by_hand(x: Tensor, r: Tensor) -> Tensor:
    return F.layer_norm(fake_quantize(x + r, "fp8_e4m3").reshape(-1, 8), (8,))


def before_a_cast(x: Tensor, r: Tensor) -> Tensor:
    return F.layer_norm(fake_quantize(x + r, "fp8_e4m3").double(), (8,))


def read_again(x: Tensor, r: Tensor) -> Tensor:
    seen = fake_quantize(x + r, "fp8_e4m3")
    return F.layer_norm(seen, (8,)) * seen


@pytest.mark.parametrize("function", [by_hand, before_a_cast, read_again])
def test_calls_of_the_user_s_own(function: Any) -> None:
    x, r = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    captured = capture(function, x, r)
    assert captured.report.counts() == {"dropout_norm": 1}
    torch.testing.assert_close(captured.output, function(x, r))


def after_a_cast(x: Tensor, r: Tensor) -> Tensor:
    return F.layer_norm(fake_quantize((x + r).double(), "fp8_e4m3"), (8,))


def twice(x: Tensor, r: Tensor) -> Tensor:
    return F.layer_norm(fake_quantize(fake_quantize(x + r, "fp8_e4m3"), "fp4_e2m1"), (8,))


@pytest.mark.parametrize("function", [after_a_cast, twice])
def test_another_order_is_left_alone(function: Any) -> None:
    x, r = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    captured = capture(function, x, r)
    assert captured.report.counts() == {}
    assert torch.equal(captured.output, function(x, r))
