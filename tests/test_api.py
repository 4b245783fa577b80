"""`fuse_pass.compile`: what it checks at once, and what it sets before tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_pass


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 40, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patterns": ["gelu"]}, ValueError, "unknown pattern 'gelu'"),
        ({"options": {"max_autotone": 1}}, ValueError, "unknown option 'max_autotone'"),
        ({"backend": "inductor"}, TypeError, "takes no `backend`"),
        ({"colour": 1}, TypeError, "colour"),
        ({"strict": None}, TypeError, "strict: expected a bool"),
        ({"patterns": 5}, TypeError, "patterns: expected a collection of names"),
        ({"options": {5: 1}}, TypeError, "options: expected names such as 'max_autotune', got 5"),
        ({"mode": "foo"}, ValueError, "unknown mode 'foo'; valid are default, .*max-autotune"),
        ({"mode": 3}, ValueError, "unknown mode 3"),
        ({"mode": "default", "options": {"strict": True}}, ValueError, "expected mode or options, got both"),
    ],
)
@pytest.mark.parametrize("is_decorator", [False, True])
def test_mistakes_are_reported_before_anything_runs(
    arguments: dict[str, Any], error: type[Exception], message: str, is_decorator: bool
) -> None:
    with pytest.raises(error, match=message):
        fuse_pass.compile(None if is_decorator else encoder(), **arguments)


def test_fast_path_is_off_while_the_compiled_model_runs_and_only_then() -> None:
    model, x = encoder().eval(), torch.randn(2, 5, 16)
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.mha.get_fastpath_enabled()))
    compiled = fuse_pass.compile(model)
    with torch.no_grad(), fuse_pass.collect() as report:
        y = compiled(x)
    assert report.counts() == {"dense_act_dense": 2, "dropout_norm": 4}
    assert seen
    assert not any(seen)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))


def test_fast_path_comes_back_after_an_error() -> None:
    with pytest.raises(Exception, match=r"[Dd]imension|size|shape"), torch.no_grad():
        fuse_pass.compile(encoder().eval())(torch.randn(2, 5, 3))
    assert torch.backends.mha.get_fastpath_enabled()


def test_without_it_the_report_tells_what_hides_the_patterns() -> None:
    with torch.no_grad():
        report = fuse_pass.coverage(encoder().eval(), torch.randn(2, 5, 16))
    assert not report.matches
    assert {decline.reason for decline in report.declines} == {fuse_pass.Reason.OPAQUE}
    assert "fuse_pass.compile" in report.declines[0].detail


def test_functions_and_decorator() -> None:
    weight1, weight2 = torch.randn(20, 6), torch.randn(6, 20)

    @fuse_pass.compile(patterns=["dense_act_dense"], fullgraph=True)
    def mlp(x: Tensor) -> Tensor:
        return torch.relu(x @ weight1.T) @ weight2.T

    x = torch.randn(3, 6)
    with fuse_pass.collect() as report:
        torch.testing.assert_close(mlp(x), torch.relu(x @ weight1.T) @ weight2.T)
    assert report.counts() == {"dense_act_dense": 1}


def test_other_models_are_compiled_as_torch_compile_does() -> None:
    model = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6))
    compiled = fuse_pass.compile(model, dynamic=True, mode="default", options=None)
    assert isinstance(compiled, torch._dynamo.OptimizedModule)
    assert compiled._orig_mod is model
    torch.testing.assert_close(compiled(torch.ones(2, 6)), model(torch.ones(2, 6)))


class WithOpaqueLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        return self.head(self.lstm(x)[0])


def test_opaque_layers_are_quantized_in_a_copy_that_shares_the_parameters() -> None:
    model, x = WithOpaqueLayers(), torch.randn(2, 4, 8)
    with fuse_pass.collect() as report:
        compiled = fuse_pass.compile(model, quantize="fp8_e4m3", fullgraph=True)
        y = compiled(x)
    assert report.counts() == {"convert": 2, "fake_quant": 1}, "the operations inside the two are not quantised again"
    assert type(model.lstm) is nn.LSTM, "the model itself is as it was"
    parameters = dict(model.named_parameters())
    for name, parameter in compiled._orig_mod.named_parameters():
        assert parameter is parameters[name]
    y.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in parameters.values())


def test_quantized_graphs_of_converted_models_are_quantized_once() -> None:
    model, x = WithOpaqueLayers(), torch.randn(2, 4, 8)
    converted = fuse_pass.convert(model, "fp8_e4m3")

    def rewrite_only(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        fused, report = fuse_pass.FuseBackend(quantize="fp8_e4m3", strict=True).rewrite(gm)
        assert report.counts()["fake_quant"] == 0
        return fused.forward

    assert torch.equal(torch.compile(converted, backend=rewrite_only)(x), converted(x))


def test_a_partly_converted_model_gives_the_bits_of_a_converted_one() -> None:
    model, x = WithOpaqueLayers(), torch.randn(2, 4, 8)
    partly = fuse_pass.convert(model, {nn.MultiheadAttention: "fp8_e4m3", nn.LSTM: "fp8_e4m3"})

    def rewrite_only(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        return fuse_pass.FuseBackend(quantize="fp8_e4m3", strict=True).rewrite(gm)[0].forward

    expected = fuse_pass.convert(model, "fp8_e4m3")(x)
    assert torch.equal(torch.compile(partly, backend=rewrite_only, fullgraph=True)(x), expected)
