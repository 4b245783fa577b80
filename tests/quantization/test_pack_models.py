"""Whole models whose layers are packed: which are, which are not and why, and what stays of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

import fuse_pass
from fuse_pass import BitLinear, pack, unpack
from fuse_pass.nn import PackedLinear

pytestmark = pytest.mark.processor


def linear(d_in: int = 96, d_out: int = 50, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, bias=bias)


def test_the_fast_path_of_encoders_does_not_read_bare_weights() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 32)
    packed = pack(encoder, "int8")
    with torch.no_grad():
        y, expected = packed(x), encoder(x)
        assert 0 < (y - expected).norm() < 0.02 * expected.norm(), "packed, and not past the packed layers"
        assert torch.equal(packed(x), y)
        back = unpack(packed)
        assert back.layers[0].activation_relu_or_gelu == encoder.layers[0].activation_relu_or_gelu == 1
        assert (back(x) - expected).norm() < 0.02 * expected.norm()


def test_hooks_stay_on_their_layers() -> None:
    model, calls = nn.Sequential(linear()), []
    model[0].register_forward_hook(lambda module, args, y: y * 0)
    model[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    packed = pack(model, "int8")
    assert not packed(torch.randn(2, 96)).any()
    assert not unpack(packed)(torch.randn(2, 96)).any()
    assert calls == [{}, {}]


def test_what_computes_something_else_is_declined() -> None:
    parametrized, replaced = nn.utils.parametrizations.weight_norm(linear()), linear()
    replaced.forward = lambda x: x[..., :1]  # type: ignore[method-assign]
    pruned = [nn.utils.prune.random_unstructured(layer, "weight", 0.5) for layer in (linear(), BitLinear(8, 4))]
    model = nn.ModuleList([parametrized, replaced, *pruned])
    with fuse_pass.collect() as report:
        pack(model, "int8", inplace=True)
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())
    assert {(decline.where, decline.detail) for decline in report.declines} == {
        ("0", "ParametrizedLinear has no packed layer"),
        ("1", "its forward was replaced"),
        ("2", "its weight is computed (pruned)"),
        ("3", "its weight is computed (pruned)"),
    }


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.conv = nn.Embedding(50, 96), linear(96, 96), nn.Conv1d(96, 96, 1)
        self.again, self.head = self.first, linear(96, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x: Any = self.again(F.gelu(self.first(self.embedding(tokens))))
        y: Tensor = self.head(self.conv(x.mT).mT)
        return y


def test_whole_models_and_the_report() -> None:
    model, tokens = Shared().eval(), torch.randint(50, (2, 7))
    with fuse_pass.collect() as report:
        packed = pack(model, "int8_weight_only")
    assert packed.first is packed.again
    assert sorted(match.where for match in report.matches) == ["embedding", "first", "head"]
    declined = {decline.where: str(decline.reason) for decline in report.declines}
    assert declined == {"conv": "no quantised layer"}
    assert isinstance(model.first, nn.Linear), "a copy was packed"
    assert (packed(tokens) - model(tokens)).norm() < 0.03 * model(tokens).norm()
    back = unpack(packed)
    assert type(back.first) is nn.Linear
    assert back.first is back.again
    torch.testing.assert_close(back(tokens), packed(tokens), rtol=1e-4, atol=1e-4)
    assert isinstance(packed.first, PackedLinear), "a copy was unpacked"
    assert type(back.embedding) is nn.Embedding


def test_include_exclude_and_inplace() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear(50, 8))
    with fuse_pass.collect() as report:
        assert pack(model, "int8", exclude="2", inplace=True) is model
    assert [type(layer) for layer in model] == [PackedLinear, nn.ReLU, nn.Linear]
    assert [(decline.where, str(decline.reason)) for decline in report.declines] == [("2", "excluded")]
    assert pack(model, "int8", include="2")[2].spec.name == "int8"
    assert unpack(model, inplace=True) is model
    assert type(model[0]) is nn.Linear
