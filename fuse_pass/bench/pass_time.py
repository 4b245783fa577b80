"""The row of `bench` about the pass itself: finding and replacing patterns takes time linear in the graph's size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node

from fuse_pass.backend import FuseBackend
from fuse_pass.bench.models import DropoutAddNorm, mlp
from fuse_pass.bench.numbers import Cost

SMALL, LARGE = 1_000, 20_000


def chained(nodes: int) -> GraphModule:
    """A Dynamo graph of at least so many nodes: feed-forward layers in a row, which share their parameters."""
    captured = _one_layer()
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    body = [node for node in captured.graph.nodes if node.op not in ("placeholder", "output")]
    (x,) = (node for node in placeholders if not node.meta["example_value"].requires_grad)
    result = next(node for node in captured.graph.output_node().all_input_nodes)
    graph = Graph()
    parameters: dict[Node, Node] = {node: graph.node_copy(node) for node in placeholders}
    end = parameters[x]
    while len(graph.nodes) < nodes:
        copies = {**parameters, x: end}
        for node in body:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        end = copies[result]
    graph.output((end,))
    return GraphModule(captured, graph)


def _one_layer() -> GraphModule:
    """`x + mlp(x)` and its norm, as Dynamo traces it."""
    feed_forward, add_norm = mlp(8, 12), DropoutAddNorm(8, 0.1)
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _: object) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    torch.compile(lambda x: add_norm(feed_forward(x), x), backend=keep)(torch.randn(2, 8))
    return graphs[0]


def _build(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    large, small = chained(LARGE), chained(SMALL)
    backend = FuseBackend(strict=True)

    def many() -> None:
        for _ in range(LARGE // SMALL):
            backend.rewrite(small)

    return lambda: backend.rewrite(large), many


COSTS = (Cost(f"pass/{LARGE}-nodes", f"{LARGE // SMALL} graphs of {SMALL}", _build, rounds=3),)
