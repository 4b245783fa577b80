"""`convert` swaps layers, keeps everything else, and says what it left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_pass
from fuse_pass import calibrate, convert, fake_quantize
from fuse_pass import nn as fuse_nn
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.quantization.layers import QuantizedDropout, QuantizedLayer, QuantizedLinear


class Model(nn.Module):
    """A shared layer, tied weights, a subclass, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.special = Special(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x)[0]
        return self.head(self.norm(self.special(self.again(torch.relu(self.shared(x))))))


class Special(nn.Linear):
    """A subclass: it may compute anything."""


TOKENS = torch.arange(8).view(2, 4)


def types(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if name}


def test_layers_are_swapped_by_exact_type() -> None:
    model = Model()
    converted = convert(model, "fp8_e4m3")
    assert types(converted) == {
        "embedding": "QuantizedEmbedding",
        "attention": "QuantizedMultiheadAttention",
        "attention.out_proj": "NonDynamicallyQuantizableLinear",
        "shared": "QuantizedLinear",
        "special": "Special",
        "norm": "QuantizedLayerNorm",
        "head": "QuantizedLinear",
    }
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules()), "the original is untouched"
    assert not torch.equal(converted(TOKENS), model(TOKENS))


def test_sharing_is_kept() -> None:
    model = Model()
    converted = convert(model, "fp8_e4m3", inplace=True)
    assert converted is model
    assert model.again is model.shared
    assert model.head.weight is model.embedding.weight


def test_parameters_are_the_same_objects_in_place() -> None:
    model = Model()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, "fp8_e5m2", inplace=True)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    old = copy.deepcopy(model.state_dict())
    model(TOKENS).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(value, old[name]) for name, value in model.state_dict().items() if "weight" in name)


def test_there_and_back() -> None:
    model = Model()
    back = convert(convert(model, "fp4_e2m1"), None)
    assert types(back) == types(model)
    torch.testing.assert_close(back.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(back(TOKENS), model(TOKENS), rtol=0, atol=0)


def test_a_format_that_holds_everything_changes_nothing() -> None:
    model = Model()
    torch.testing.assert_close(convert(model, "fp32")(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        ({"include": "head"}, {"head"}),
        ({"include": ["*ed*", "norm"], "exclude": "norm"}, {"embedding", "shared"}),
        ({"exclude": ["attention", "e*", "s*"]}, {"norm", "head"}),
    ],
)
def test_names_choose(options: dict[str, Any], quantized: set[str]) -> None:
    converted = convert(Model(), "fp16", **options)
    assert {name for name, module in converted.named_modules() if isinstance(module, QuantizedLayer)} == quantized


def test_a_mapping_of_types_and_names() -> None:
    narrow, wide = QuantSpec.uniform("fp4_e2m1"), QuantSpec.uniform("bf16")
    converted = convert(Model(), {nn.Linear: "bf16", "head": narrow, "norm": None, nn.LayerNorm: "fp16"})
    assert converted.shared.spec == wide
    assert converted.head.spec == narrow
    assert type(converted.norm) is nn.LayerNorm
    assert type(converted.embedding) is nn.Embedding


def test_the_report_says_what_was_left_alone() -> None:
    with fuse_pass.collect() as report:
        convert(Model(), "fp8_e4m3", exclude="norm")
    assert report.counts() == {"convert": 4}
    left = {decline.where: decline.reason for decline in report.declines}
    assert left == {"special": fuse_pass.Reason.NO_QUANTIZED_LAYER, "norm": fuse_pass.Reason.EXCLUDED}
    assert "Special has no quantised layer" in str(report)


def test_a_layer_itself() -> None:
    layer = nn.Linear(3, 4)
    converted = convert(layer, "fp16")
    assert type(converted) is fuse_nn.QuantizedLinear
    torch.testing.assert_close(converted.weight, layer.weight)
    assert convert(layer, "fp16", inplace=True).weight is layer.weight


def test_hooks_and_modes_survive() -> None:
    layer, seen = nn.Linear(3, 4).eval(), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    converted = convert(layer, "fp16", inplace=True)
    converted(torch.randn(2, 3))
    assert seen == ["QuantizedLinear"]
    assert not converted.training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"spec": "fp9"}, ValueError, "unknown format 'fp9'; valid names are"),
        ({"spec": 8}, TypeError, "expected a format or its name, got 8"),
        ({"spec": "fp16", "include": "headd"}, ValueError, "no module's name matches 'headd'"),
        ({"spec": "fp16", "exclude": [nn.Linear]}, TypeError, "exclude: expected names or patterns"),
        ({"spec": {"headd": "fp16"}}, ValueError, "no module's name matches 'headd'"),
        ({"spec": {nn.Transformer: "fp16"}}, ValueError, "Transformer has no quantised layer"),
        ({"spec": {3: "fp16"}}, TypeError, "expected layer types and names"),
    ],
)
def test_mistakes(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert(Model(), **arguments)


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function"):
        convert(lambda x: x, "fp16")


def test_llm_int8_weights() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), fuse_nn.FusedDenseGELUDense(24, 32), nn.Linear(24, 4))
    x = torch.randn(5, 16)
    with fuse_pass.collect() as report:
        converted = convert(model, "llm_int8", exclude="3")
    assert report.counts() == {"convert": 2}
    assert [type(layer).__name__ for layer in converted] == ["Int8Linear", "ReLU", "FusedDenseGELUDense", "Linear"]
    assert converted[0].weight.dtype is converted[2].dense1.weight.dtype is torch.int8
    assert model[0].weight.dtype is torch.float32
    torch.testing.assert_close(converted(x), model(x), rtol=0.1, atol=0.05)
    assert not torch.equal(converted(x), model(x))


@pytest.mark.parametrize("spec", ["fp8_e4m3", "llm_int8"])
def test_the_fast_path_of_encoder_layers_does_not_skip_quantized_parts(spec: str) -> None:
    """In eval PyTorch would run such a layer as one call on its bare weights."""
    layer = nn.TransformerEncoderLayer(16, 2, 40, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.tensor([[False] * 5, [False] * 5, [False] * 3 + [True] * 2])
    converted = convert(model, spec)
    with torch.no_grad():
        for masks in ({}, {"src_key_padding_mask": padding}):
            y = converted(x, **masks)
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                expected = converted(x, **masks)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
            torch.testing.assert_close(y, expected)
            assert not torch.allclose(y, model(x, **masks), atol=1e-4)
    if spec != "llm_int8":
        back = convert(converted, None)
        assert back.use_nested_tensor == model.use_nested_tensor
        assert back.layers[0].activation_relu_or_gelu == model.layers[0].activation_relu_or_gelu


def test_dropout_is_left_alone_unless_its_type_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.AlphaDropout(0.5))
    assert [type(m) for m in convert(model, "int8")] == [QuantizedLinear, nn.Dropout, nn.AlphaDropout]
    assert [type(m) for m in convert(model, {"*": "int8"})] == [QuantizedLinear, nn.Dropout, nn.AlphaDropout]
    named = convert(model, {nn.Linear: "int8", nn.Dropout: QuantSpec(input="fp4_e2m1", output="int8", grad="fp8_e5m2")})
    assert [type(m) for m in named] == [QuantizedLinear, QuantizedDropout, nn.AlphaDropout]
    x = torch.randn(4, 8)
    torch.manual_seed(3)
    trained = named[1](x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(fake_quantize(x, "fp4_e2m1"), 0.5, True)
    assert torch.equal(trained, fake_quantize(dropped, "int8"))
    assert named.eval()[1](x) is x, "nothing is dropped, and nothing is quantised"


def test_calibration_gives_dropout_the_scales_of_training() -> None:
    model = convert(nn.Dropout(0.5), {nn.Dropout: QuantSpec(input=Site("int8", scale="static"))})
    calibrate(model, [torch.tensor([-127.0, 2.0])])
    assert model.input_scale == 1
    assert torch.equal(model.eval()(torch.tensor([0.3])), torch.tensor([0.3]))
    assert model.train()(torch.full((50,), 0.7)).unique().tolist() == [0, 2]


def test_hooks_stay_on_layers_with_int8_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].register_forward_hook(lambda module, args, y: y * 0)
    assert not convert(model, "llm_int8")(torch.randn(2, 8)).any()
