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
    ],
)
def test_mistakes_are_reported_before_anything_runs(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fuse_pass.compile(encoder(), **arguments)


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
