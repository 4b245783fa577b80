"""A description and a state dict are a model: built again on a float one, bit for bit, from JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse_pass import Granularity, PackSpec, QuantSpec, Site, calibrate, convert, pack
from fuse_pass.nn import Int8Linear
from fuse_pass.quantization.description import describe, finish_loading, rebuild
from fuse_pass.quantization.packing import SPECS

ROW = Granularity("channel", axis=0)


class Model(nn.Module):
    """A layer that is used twice, one without a bias, an embedding, and layers that only `convert` knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.first = nn.Linear(24, 40)
        self.again = self.first
        self.body = nn.Sequential(nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 24, bias=False))
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.steps, self.image = nn.LSTM(24, 24, batch_first=True), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.first(self.embed(tokens))) + self.again(self.embed(tokens)).mean(-1, keepdim=True)
        y = self.steps(self.attention(x, x, x, need_weights=False)[0])[0]
        z: Tensor = self.image(y.unsqueeze(1)).squeeze(1)
        return z


def tokens() -> Tensor:
    return torch.arange(10).view(2, 5)


def calibrated(spec: QuantSpec, **options: Any) -> nn.Module:
    return calibrate(convert(Model(), spec, **options), [tokens()])


STATIC = QuantSpec(
    input=Site("int8", scale="static"),
    weight=Site("int8", scale="static", granularity=ROW),
    bias=Site("int16", scale="static"),
    output=Site("int8_asymmetric", scale="static"),
)
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"packed to {spec}": lambda spec=spec: pack(Model(), spec) for spec in SPECS},
    "packed by groups with a minimum": lambda: pack(Model(), PackSpec("int4_weight_only", group=32, symmetric=False)),
    "packed in two ways": lambda: pack(pack(Model(), "nf4", include="body.*"), "int8"),
    "converted": lambda: convert(Model(), "fp8_e4m3"),
    "converted in two ways": lambda: convert(Model(), {nn.Linear: "int8", nn.LayerNorm: "fp16", "embed": None}),
    "llm_int8": lambda: convert(Model(), "llm_int8"),
    "calibrated": lambda: calibrated(STATIC, include=["first", "body.2"]),
    "learned scales": lambda: calibrated(QuantSpec.uniform("int8"), learn_scales=True),
    "converted and packed": lambda: pack(convert(Model(), "int8")),
    "calibrated and packed": lambda: pack(calibrated(STATIC, include=["first", "body.2"])),
    "weight alone, packed": lambda: pack(
        convert(Model(), QuantSpec(weight=Site("int4_asymmetric", granularity=Granularity("group", size=8))))
    ),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_a_described_model_is_built_again(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    described = json.loads(json.dumps(describe(model)))
    assert described
    with torch.device("meta"):
        skeleton = rebuild(Model().eval(), described, lambda name: name)
    assert all(value.is_meta for value in skeleton.state_dict().values())
    assert {key: (value.shape, value.dtype) for key, value in skeleton.state_dict().items()} == {
        key: (value.shape, value.dtype) for key, value in model.state_dict().items()
    }
    skeleton.load_state_dict(model.state_dict(), assign=True)
    like = skeleton.get_submodule("embed")
    if hasattr(like, "like"):  # of what dtype a packed table was, which is in no state dict
        like.like = torch.empty(0)
    finish_loading(skeleton)
    assert torch.equal(skeleton(tokens()), model(tokens()))
    assert describe(skeleton) == describe(model)
    assert repr(skeleton) == repr(model)


def test_to_empty_and_back() -> None:
    """The values that codes stand for are in no state dict, and are there again after one was loaded."""
    model = pack(Model(), "nf4").eval()
    again = pack(Model(), "nf4").eval().to_empty(device="cpu")
    for module in again.modules():
        if hasattr(module, "table"):
            module.table.fill_(float("nan"))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens()), model(tokens()))


def test_int8_layers_that_still_train() -> None:
    model = nn.Sequential(Int8Linear.from_float(nn.Linear(8, 4), threshold=0.0))
    described = describe(model)
    assert described == [{"kind": "int8", "threshold": 0.0, "quantized": False, "names": ["0"]}]
    again = rebuild(nn.Sequential(nn.Linear(8, 4)), described, lambda name: name)
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(again(x), model(x))


def test_a_model_without_such_layers_has_no_description() -> None:
    assert describe(Model()) == []


GOOD = {"kind": "int8", "threshold": 6.0, "quantized": True, "names": ["first"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({**GOOD, "kind": "int9"}, "expected layers of kind quantized, packed, packed_quantized, int8, got 'int9'"),
    "field": ({**GOOD, "bits": 8}, "layers of kind 'int8': expected kind, names, quantized, threshold, got .*bits"),
    "no field": ({"kind": "packed", "names": ["first"]}, "layers of kind 'packed': expected kind, names, spec, got"),
    "another layer": ({**GOOD, "names": ["embed"]}, "embed was described as int8, .* expected an nn.Linear, got a Emb"),
    "no such layer": ({**GOOD, "names": ["second"]}, "names layers that the model does not have: second"),
    "spec": ({"kind": "packed", "spec": {"name": "int3"}, "names": ["first"]}, "pack: expected one of 'int8'"),
    "field of a spec": ({"kind": "packed", "spec": {"name": "int8", "x": 1}, "names": ["first"]}, "does not fit.*'x'"),
}


@pytest.mark.parametrize(("group", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rebuild(Model(), [group], lambda name: name)


def test_codes_that_were_not_loaded_are_found() -> None:
    with torch.device("meta"):
        skeleton = pack(Model(), "int8")
    with pytest.raises(ValueError, match=r"embed\.packed_format: expected the codes of a packed layer, got none"):
        finish_loading(skeleton)


def test_codes_of_another_spec_are_found() -> None:
    model = pack(Model(), "nf4")
    model.first.packed_format = pack(Model(), "fp4").first.packed_format
    with pytest.raises(ValueError, match=r"first\.packed_format: expected .*nf4.*, got .*fp4.*pack the model by that"):
        finish_loading(model)
