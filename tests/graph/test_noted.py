"""Graphs that Dynamo has not made: those of `torch.export` are rewritten, of others the report says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fuse_pass import FuseBackend
from fuse_pass.report import Reason


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 40), nn.Linear(40, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor, scale: dict[str, Tensor]) -> dict[str, Tensor]:
        h = F.dropout(self.down(F.gelu(self.up(x))), 0.0, self.training)
        return {"y": self.norm(x + h) * scale["scale"]}


def given() -> tuple[Tensor, dict[str, Tensor]]:
    return torch.linspace(-2, 2, 96).view(6, 16), {"scale": torch.full((16,), 2.0)}


def exported(model: nn.Module, **options: Any) -> torch.fx.GraphModule:
    return torch.export.export(model, given(), **options).module(check_guards=False)


def ops_of(module: torch.fx.GraphModule) -> set[str]:
    return {str(node.target).removesuffix(".default") for node in module.graph.nodes if "fuse_pass" in str(node.target)}


@pytest.mark.parametrize("training", [False, True])
def test_an_exported_graph_is_rewritten_with_its_gradients(training: bool) -> None:
    """A `val` says that nothing in between requires a gradient; all of it may."""
    model = Block().train(training)
    original = exported(model)
    rewritten, report = FuseBackend(strict=True).rewrite(original)
    assert report.counts() == {"dense_act_dense": 1, "dropout_norm": 1}
    assert ops_of(rewritten) == {"fuse_pass.dense_act_dense", "fuse_pass.dropout_norm"}
    assert ops_of(original) == set()
    gradients = []
    for run in (model, rewritten):
        y = run(*given())["y"]
        y.sin().sum().backward()  # a square would be the same for every row
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        model.zero_grad()
        torch.testing.assert_close(y, model(*given())["y"])
    assert len(gradients[0]) == 6
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_without_gradients_it_gets_the_ops_of_inference() -> None:
    with torch.no_grad():
        rewritten, _ = FuseBackend(strict=True).rewrite(exported(Block().eval()))
    assert "fuse_pass.dense_act_dense_inference" in ops_of(rewritten)


def test_every_node_says_what_it_is_like_as_export_does() -> None:
    rewritten, _ = FuseBackend(strict=True).rewrite(
        exported(Block(), dynamic_shapes=({0: torch.export.Dim.AUTO}, {"scale": None}))
    )
    for node in rewritten.graph.nodes:
        assert "example_value" not in node.meta
        assert "val" in node.meta or node.op in ("output", "call_module")
    again = torch.export.export(rewritten, given())
    torch.testing.assert_close(again.module()(*given()), rewritten(*given()))


class InAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, scale: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.block(x, scale)["y"].sin()


def test_regions_of_an_exported_graph() -> None:
    original = exported(InAutocast())
    rewritten, _ = FuseBackend(strict=True).rewrite(original)
    torch.testing.assert_close(rewritten(*given()), original(*given()), rtol=2e-2, atol=2e-2)


def functional(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight)), other)


def test_a_symbolically_traced_graph_with_shapes() -> None:
    values = torch.randn(6, 16), torch.randn(40, 16), torch.randn(16, 40)
    traced = torch.fx.symbolic_trace(functional)
    backend = FuseBackend(strict=True)
    untouched, report = backend.rewrite(traced)
    assert untouched is traced
    assert [note.reason for note in report.notes] == [Reason.NOT_CAPTURED]
    assert "notes no shape" in str(report)
    with pytest.raises(ValueError, match=r"quantize=.*notes no shape.*fuse_pass\.fuse"):
        FuseBackend(quantize="int8").rewrite(traced)
    with FakeTensorMode() as mode:
        FakeTensorProp(traced, mode).propagate(*values)
    rewritten, report = backend.rewrite(traced)
    assert report.counts() == {"dense_act_dense": 1}
    assert not report.notes
    torch.testing.assert_close(rewritten(*values), functional(*values), rtol=1e-4, atol=1e-4)


def test_modules_that_were_not_opened_are_named() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        FakeTensorProp(traced, mode).propagate(torch.randn(6, 16))
    untouched, report = FuseBackend(strict=True).rewrite(traced)
    assert untouched is traced
    assert "calls modules without opening them: 0, 2." in str(report)
    with pytest.raises(ValueError, match="without opening"):
        FuseBackend(quantize="int8").rewrite(traced)
