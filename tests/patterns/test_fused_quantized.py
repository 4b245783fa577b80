"""Feed-forward blocks of quantised layers: one op, and the numbers of the quantised graph that is not fused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse_pass import FuseBackend, QuantSpec, Reason, fake_quantize
from fuse_pass.ops.packed_format import quantize_packed, straight_through_packed
from tests.capture import Captured, capture
from tests.packed import packed_format
from tests.patterns.truth import SEED, SameDropout

MIXED = QuantSpec(input="fp8_e5m2", weight="fp8_e4m3", output="fp16")
INPUTS = QuantSpec(input="fp8_e4m3", weight="fp8_e4m3")


class Gated(nn.Module):
    """Gate and up as two projections or as the halves of one; `glu` for the module that does both."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(6, 10 if kind == "separate" else 20)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.act, self.dropout = nn.GLU() if kind == "glu" else nn.SiLU(), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "glu":
            return self.down(self.dropout(self.act(self.first(x))))
        gate, up = (self.first(x), self.up(x)) if self.kind == "separate" else self.first(x).chunk(2, -1)
        return self.down(self.dropout(self.act(gate) * up))


def block(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), act, nn.Dropout(0.25), nn.Linear(10, 6))


def run(model: nn.Module, backend: FuseBackend) -> tuple[Captured, dict[str, Tensor]]:
    model, x = copy.deepcopy(model), torch.linspace(-2, 2, 72).view(3, 4, 6).requires_grad_()
    torch.manual_seed(SEED)
    captured = capture(model, x, backend=backend)
    captured.output.backward(torch.linspace(-1, 2, 72).view(3, 4, 6))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return captured, {"y": captured.output.detach(), "x": x.grad, **grads}


def assert_same_numbers(model: nn.Module, spec: Any, pattern: str) -> Captured:
    """One fused block, with the numbers of the quantised graph that is not fused."""
    fused, ours = run(model, FuseBackend(quantize=spec, strict=True))
    with SameDropout():
        unfused, theirs = run(model, FuseBackend([], quantize=spec, strict=True))
    assert fused.report.counts() == {"fake_quant": unfused.report.counts()["fake_quant"], pattern: 1}, fused.report
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    return fused


@pytest.mark.parametrize("spec", ["fp8_e4m3", "fp4_e2m1", MIXED, INPUTS], ids=["fp8", "fp4", "mixed", "inputs"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(inplace=True), nn.PReLU()], ids=["gelu", "relu_", "prelu"])
def test_dense(act: nn.Module, training: bool, spec: Any) -> None:
    assert_same_numbers(block(act).train(training), spec, "dense_act_dense")


@pytest.mark.parametrize("spec", ["fp8_e4m3", MIXED], ids=["fp8", "mixed"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["separate", "merged"])
def test_gated(kind: str, training: bool, spec: Any) -> None:
    model = Gated(kind).train(training)
    if spec is MIXED:  # the gate is rounded to the input format as well, the other half is not
        captured, _ = run(model, FuseBackend(quantize=spec, strict=True))
        assert captured.report.counts()["gated_dense"] == 0
        assert Reason.QUANTIZATION in {decline.reason for decline in captured.report.declines}
    else:
        assert_same_numbers(model, spec, "gated_dense")


def test_a_gated_unit_before_dropout_declines() -> None:
    """Its product is rounded before dropout and after it."""
    assert_same_numbers(Gated("glu").eval(), "fp8_e4m3", "gated_dense")
    captured, _ = run(Gated("glu"), FuseBackend(quantize="fp8_e4m3", strict=True))
    (decline,) = [d for d in captured.report.declines if d.pattern == "gated_dense"]
    assert (decline.reason, decline.detail.split()[1:]) == (
        Reason.QUANTIZATION, ["is", "rounded", "before", "dropout,", "too"],
    )  # fmt: skip


@pytest.mark.parametrize("spec", ["int8", "mxfp8"])
def test_scales_of_the_tensor_stay_outside(spec: str) -> None:
    captured, _ = run(block(nn.GELU()), FuseBackend(quantize=spec, strict=True))
    assert captured.report.counts() == {"fake_quant": 3}


def test_the_ops_with_a_rounded_result() -> None:
    """opcheck, and values and gradients against the formula in PyTorch."""
    fp8, bf16 = (
        packed_format(4, 3, 7, "fn", "nearest", True, "saturate"),
        packed_format(8, 7, 127, "ieee", "nearest", True, "ieee"),
    )
    x, w1, wu, w2 = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (6, 4), (6, 4), (5, 6)))
    act = torch.nn.functional.silu

    def dense(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        a = straight_through_packed(act(straight_through_packed(x @ w1.T, bf16)), bf16)
        return straight_through_packed(a, fp8) @ w2.T

    def gated(x: Tensor, w1: Tensor, wu: Tensor, w2: Tensor) -> Tensor:
        gate, up = (straight_through_packed(x @ w.T, bf16) for w in (w1, wu))
        return straight_through_packed(straight_through_packed(act(gate), bf16) * up, fp8) @ w2.T

    ops = torch.ops.fuse_pass
    of_dense = (x, w1, None, w2, None, None, None, 0.0, "silu", [], bf16, fp8, bf16)
    of_gated = (x, w1, None, wu, None, w2, None, None, 0.0, "silu", [], False, bf16, fp8, bf16)
    cases = ((ops.dense_act_dense, of_dense, dense, (x, w1, w2)), (ops.gated_dense, of_gated, gated, (x, w1, wu, w2)))
    for op, arguments, formula, inputs in cases:
        torch.library.opcheck(op.default, arguments)
        ours, theirs = op(*arguments)[0], formula(*inputs)
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(y.sin().sum(), inputs) for y in (ours, theirs)]
        torch.testing.assert_close(grads[0], grads[1])


def test_two_quantizations_in_one_list() -> None:
    fp16, fp4 = (
        packed_format(5, 10, 15, "ieee", "nearest", True, "ieee"),
        packed_format(2, 1, 1, "finite", "nearest", True, "saturate"),
    )
    x = torch.linspace(-8, 8, 1001)
    expected = fake_quantize(fake_quantize(x, "fp16"), "fp4_e2m1")
    assert torch.equal(quantize_packed(x, [*fp16, *fp4]), expected)
    assert torch.equal(straight_through_packed(x, [*fp16, *fp4]), expected)
