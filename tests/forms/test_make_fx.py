"""Graph forms: what `make_fx` records of a function that we write into a graph; a failure names the form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def targets(graph: Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_detach_with_an_empty_table_of_decompositions() -> None:
    """Without a table, torch 2.14 and later record `alias`, through which gradients flow."""
    found = targets(make_fx(lambda x: x.detach() * 2, decomposition_table={})(torch.ones(2)).graph)
    assert found == [aten.detach.default, aten.mul.Tensor], f"detach() is recorded as {found}: gradients may flow"


def test_values_are_noted() -> None:
    with FakeTensorMode():
        graph = make_fx(torch.sin, decomposition_table={})(torch.ones(2, 3)).graph
    (node,) = graph.find_nodes(op="call_function", target=aten.sin.default)
    assert node.meta["val"].shape == (2, 3), "make_fx no longer notes results in meta['val']"


def test_layers_before_autograd_and_autocast_look_at_them() -> None:
    x, w, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    traced = make_fx(lambda x, w, b: F.layer_norm(F.linear(x, w, b), (4,)), pre_dispatch=True)(x, w, b)
    assert targets(traced.graph) == [aten.linear.default, aten.layer_norm.default], (
        f"pre_dispatch no longer records layers whole: {targets(traced.graph)}"
    )
