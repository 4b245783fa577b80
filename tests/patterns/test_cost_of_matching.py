"""Matching and rewriting take as many steps per block in a long graph as in a short one."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

import fuse_pass
from fuse_pass.backend import FuseBackend
from tests.capture import capture, everything_pays

PACKAGE = str(Path(fuse_pass.__file__).parent)
BLOCKS = 24


class Block(nn.Module):
    """A transformer block whose attention is one Linear."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.mix = kind, nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(8), nn.LayerNorm(8), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "post-norm":
            x = self.norm1(x + self.dropout(self.mix(x)))
            return self.norm2(x + self.dropout(self.mlp(x)))  # type: ignore[no-any-return]
        if self.kind == "pre-norm":
            x = x + self.dropout(self.mix(self.norm1(x)))
            return x + self.dropout(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]
        if self.kind == "autocast in each block":
            with torch.autocast("cpu", torch.bfloat16, enabled=False):
                return self.norm1(x + self.dropout(self.mlp(x)))  # type: ignore[no-any-return]
        return x + torch.sin(self.mix(x)) * x  # nothing to be found, but for the Linear


def graph_of(kind: str, blocks: int) -> GraphModule:
    """The captured graph of one block, many times in a row, each with parameters of its own."""
    one = capture(Block(kind), torch.randn(4, 8)).originals[0].graph
    placeholders, result = one.find_nodes(op="placeholder"), one.output_node().args[0][0]
    x = next(node for node in placeholders if node.meta["example_value"].shape == (4, 8))
    graph = Graph()
    twins = [{node: _twin(graph, node, i) for node in placeholders if node is not x or i == 0} for i in range(blocks)]
    for before, here in zip([{}, *twins], twins, strict=False):
        here.setdefault(x, before.get(result))
        for node in one.nodes:
            if node.op not in ("placeholder", "output"):
                here[node] = graph.node_copy(node, here.__getitem__)
    graph.output((twins[-1][result],))
    return GraphModule(nn.Module(), graph)


def _twin(graph: Graph, placeholder: Node, i: int) -> Node:
    twin = graph.placeholder(f"{placeholder.name}_{i}")
    twin.meta = dict(placeholder.meta)
    return twin


def calls_in_the_package(run: Callable[[], Any]) -> int:
    count = 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kind", ["post-norm", "pre-norm", "autocast in each block", "plain"])
def test_steps_per_block_do_not_grow(kind: str) -> None:
    rewrite = functools.partial(FuseBackend(strict=True).rewrite, pays=everything_pays)
    rewrite(graph_of(kind, 1))  # what is computed once and kept
    # Searches look back a bounded number of nodes, so the first blocks are cheaper than those that follow.
    graphs = [graph_of(kind, times * BLOCKS) for times in (1, 2, 3)]
    first, second, third = (calls_in_the_package(functools.partial(rewrite, graph)) for graph in graphs)
    assert second - first > 20 * BLOCKS, "the counter sees the pass"
    assert third - second <= 1.02 * (second - first)


def test_code_of_the_copy_is_not_written_for_nobody() -> None:
    """Inductor interprets the graph."""
    rewritten, report = FuseBackend(strict=True).rewrite(graph_of("post-norm", 1))
    assert report.matches
    assert rewritten._needs_recompile()  # type: ignore[operator]
    assert "fuse_pass.dropout_norm" in rewritten.code
    assert not rewritten._needs_recompile()  # type: ignore[operator]
