"""Recording: calls become nodes with fake values, sizes are read in the graph, strangers are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fuse_pass.graph.edit import Editor, RewriteError
from fuse_pass.graph.record import Recorder
from fuse_pass.graph.view import GraphView
from tests.graph.dynamo import graph_of


def recorded(function: Callable[[Tensor], Any], x: Tensor, *, dynamic: bool = False) -> GraphModule:
    """The graph of `torch.relu(x)` with `function` put in its place."""
    gm = graph_of(torch.relu, x, dynamic=dynamic)
    (relu,) = (node for node in gm.graph.nodes if node.target is torch.relu)
    editor = Editor(GraphView(gm.graph))
    with editor.before(relu):
        recorder = Recorder(editor)
        with recorder:
            result = function(recorder.value_of(relu.args[0]))
        new = recorder.node_of(result)
    editor.replace(relu, new)
    gm.graph.erase_node(relu)
    gm.graph.lint()
    gm.recompile()
    return gm


def targets(gm: GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op.startswith("call")]


def test_functions_methods_and_operators() -> None:
    x = torch.randn(3, 4)
    gm = recorded(lambda x: torch.relu(x.neg() * 2) @ x.new_ones((4, 4)), x)
    assert targets(gm) == ["neg", "mul", torch.relu, "new_ones", "matmul"]
    torch.testing.assert_close(gm(x)[0], torch.relu(-x * 2) @ torch.ones(4, 4))
    assert all("example_value" in node.meta for node in gm.graph.nodes if node.op.startswith("call"))


def test_several_results() -> None:
    x = torch.randn(4, 4)
    gm = recorded(lambda x: torch.cat(tuple(reversed(x.chunk(2)))), x)
    torch.testing.assert_close(gm(x)[0], torch.cat((x[2:], x[:2])))


def test_sizes_are_read_in_the_graph() -> None:
    x = torch.randn(6, 4)
    gm = recorded(lambda x: x + x.new_ones((x.shape[0], 1)), x, dynamic=True)
    assert "size" in targets(gm)


def test_a_tensor_from_elsewhere_is_refused() -> None:
    stranger = torch.ones(4)
    with pytest.raises(RewriteError, match="comes from no node"):
        recorded(lambda x: x + stranger, torch.randn(3, 4))


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(RewriteError, match="which is no tensor"):
        recorded(lambda x: x * x.dim(), torch.randn(3, 4))


def test_layouts_are_kept() -> None:
    x = torch.randn(3, 4)
    gm = graph_of(lambda x: torch.relu(x.t()), x)
    (relu,) = (node for node in gm.graph.nodes if node.target is torch.relu)
    editor = Editor(GraphView(gm.graph))
    with editor.before(relu):
        plain = editor.call("contiguous", editor.call(torch.relu, relu.args[0]))
        new = editor.laid_out_as(relu, plain)
    assert plain.meta["example_value"].stride() == (3, 1)
    assert new.meta["example_value"].stride() == relu.meta["example_value"].stride() == (1, 4)
    editor.replace(relu, new)
    with pytest.raises(RewriteError, match="expected strides"):
        editor.stands_for(plain, new)
