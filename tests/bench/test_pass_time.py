"""The graph that the pass is timed on: as long as asked for, and made of candidates that are all replaced."""

from __future__ import annotations

import pytest

from fuse_pass.backend import FuseBackend
from fuse_pass.bench.pass_time import chained


@pytest.mark.parametrize("nodes", [30, 300])
def test_chain_is_fused_in_every_link(nodes: int) -> None:
    gm = chained(nodes)
    gm.graph.lint()
    layers = sum(node.op == "call_function" and "layer_norm" in str(node.target) for node in gm.graph.nodes)
    assert nodes <= len(gm.graph.nodes) < nodes + 12
    _, report = FuseBackend(strict=True).rewrite(gm)
    assert report.counts() == {"dense_act_dense": layers, "dropout_norm": layers}
    assert layers >= nodes // 12
    assert report.declines == []
