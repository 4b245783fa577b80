"""Steers min-cut: what our ops can recompute cheaply is recomputed in backward, never saved.

The joint graph is CSE'd, so the activation that our backward recomputes from `h` is the forward's own node, and min-cut
would save it as well as `h`. It also minimises bytes, so it prefers a stored bool mask to a recomputed one, which costs
6-9 ns per element on a CPU against 0.5-0.9 for the hash. A recompute tag on exactly our nodes undoes both.

How much of a feed-forward block is recomputed is the user's choice: one of `MEMORY`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from fuse_pass.inductor import compat
from fuse_pass.inductor.compiler import STORED_ONCE, CustomGraphPass, is_seed, seeds_of
from fuse_pass.inductor.private import OpOverload, prims
from fuse_pass.ops.fused_op import FusedOp, declaration_of, is_backward

MEMORY = ("fastest", "balanced", "smallest")
_MASK_DTYPES = (torch.bool, torch.int32)
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class RecomputeTags(CustomGraphPass):
    """Inductor's `joint_custom_post_pass`; runs the passes that the user has set there first.

    That it is set tells the rest of Inductor's work that the graph is ours.

    Args:
        key: identity of fuse_pass for Inductor's and AOTAutograd's caches.
        inner: the user's own passes for the same slot.
        memory: one of `MEMORY`. Masks are always recomputed; "balanced" recomputes the activation between two Linear
            layers too, "smallest" also the product before it.
        guarded_inputs: sizes and strides of the inputs are checked before the compiled graph is called.
    """

    def __init__(
        self,
        key: bytes,
        inner: Sequence[Callable[[Graph], None]] = (),
        *,
        memory: str = "balanced",
        guarded_inputs: bool = False,
    ) -> None:
        self._key = key
        self._inner = tuple(inner)
        self._memory = memory
        self.guarded_inputs = guarded_inputs

    def __call__(self, graph: Graph) -> None:
        for run in self._inner:
            run(graph)
        for node in graph.nodes:
            if is_seed(node):  # PyTorch's dropouts draw again too where memory is scarce
                _keep_seed(node)
            elif "recompute" not in node.meta and _is_recomputable(node, self._memory):
                recompute_in_backward(node)

    def uuid(self) -> Any:
        inner = [run.uuid() if isinstance(run, CustomGraphPass) else None for run in self._inner]
        # Inductor takes None as "do not cache": right for a pass of the user that has no identity.
        return None if None in inner else (self._key, self._memory, self.guarded_inputs, *inner)


def recompute_in_backward(node: Node) -> None:
    """Never kept: min-cut computes it again."""
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = 0


def _keep_seed(seed: Node) -> None:
    """On a GPU as a part of the tensor in which all seeds of a graph are drawn: by itself each would be a kernel."""
    if seed.meta["val"].device.type == "cpu":
        compat.keep_for_backward(seed)
    else:
        compat.keep_for_backward(seeds_of(seed))
        recompute_in_backward(seed)


def _is_recomputable(node: Node, memory: str) -> bool:
    value = node.meta.get("val")
    if not _is_ours(node) or not isinstance(value, torch.Tensor):
        return False
    if _is_row_of_columns(node):
        return True
    if value.device.type != "cpu" and is_backward(node.meta["original_aten"]) and _is_pointwise(node):
        # What backward derives from the values that we keep for it: min-cut would have forward store it beside them,
        # as large and by a kernel of its own (sum and LayerNorm 8192x4096 in float32: 806 against 537 MB).
        return True
    if value.dtype in _MASK_DTYPES:
        return value.dim() > 0  # the seed itself is saved: a second draw would be another mask
    op = _origin(node)
    if node.target is STORED_ONCE and not (op is not None and op.stores_what_it_keeps):
        return True
    if op is None or not op.recompute or memory == "fastest":
        return False
    return _is_pointwise(node) or (memory == "smallest" and _is_hidden_product(node, op))


def _is_row_of_columns(node: Node) -> bool:
    """Whether a node is `0, 1, 2, …`, or the same bits as floats, which some processors load faster."""
    while node.target in (STORED_ONCE, torch.ops.aten.view.dtype) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.target is prims.iota.default


def _is_ours(node: Node) -> bool:
    """Whether a node was decomposed from an op of ours, a backward one or one that draws among them."""
    origin = node.meta.get("original_aten")
    is_call = node.op == "call_function" and isinstance(node.target, OpOverload)
    return is_call and isinstance(origin, OpOverload) and origin.namespace == "fuse_pass"


def _origin(node: Node) -> type[FusedOp] | None:
    """The declared op that a node was decomposed from."""
    return declaration_of(node.meta.get("original_aten"))


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_hidden_product(node: Node, op: type[FusedOp]) -> bool:
    """Whether a node is the first product of a block: the one that its own activation reads."""
    is_product = node.target in _PRODUCTS or node.target == torch.ops.fuse_pass.gemm.default
    return is_product and any(_origin(user) is op and _is_pointwise(user) for user in node.users)
