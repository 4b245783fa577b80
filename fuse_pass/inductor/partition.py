"""Steers min-cut: what our ops can recompute cheaply is recomputed in backward, never saved.

The joint graph is CSE'd, so the activation that our backward recomputes from `h` is the forward's own node, and min-cut
would save it as well as `h`. It also minimises bytes, so it prefers a stored bool mask to a recomputed one, which costs
6-9 ns per element on a CPU against 0.5-0.9 for the hash. A recompute tag on exactly our nodes undoes both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

NAMESPACE = "fuse_pass"
# Forward ops whose elementwise part is recomputed whole. Of the other ops only the random mask is.
_RECOMPUTED_OPS = ("dense_act_dense", "act_dense", "gated_dense")
_MASK_DTYPES = (torch.bool, torch.int32)


class RecomputeTags(CustomGraphPass):
    """Inductor's `joint_custom_post_pass`; runs the passes that the user has set there first.

    Args:
        key: identity of fuse_pass for Inductor's and AOTAutograd's caches.
        inner: the user's own passes for the same slot.
    """

    def __init__(self, key: bytes, inner: Sequence[Callable[[Graph], None]] = ()) -> None:
        self._key = key
        self._inner = tuple(inner)

    def __call__(self, graph: Graph) -> None:
        for run in self._inner:
            run(graph)
        for node in graph.nodes:
            if "recompute" not in node.meta and _is_recomputable(node):
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                node.meta["ac_graph_id"] = 0

    def uuid(self) -> Any:
        inner = [run.uuid() if isinstance(run, CustomGraphPass) else None for run in self._inner]
        # Inductor takes None as "do not cache": right for a pass of the user that has no identity.
        return None if None in inner else (self._key, *inner)


def _is_recomputable(node: Node) -> bool:
    origin = node.meta.get("original_aten")
    if node.op != "call_function" or not isinstance(origin, torch._ops.OpOverload) or origin.namespace != NAMESPACE:
        return False
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if value.dtype in _MASK_DTYPES:
        return value.dim() > 0  # the seed itself is saved: a second draw would be another mask
    return origin._opname in _RECOMPUTED_OPS and torch.Tag.pointwise in node.target.tags
