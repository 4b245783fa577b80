"""The dropouts that no pattern took, those inside attention among them, draw their masks from our generator.

On a CPU Inductor draws a float32 per element by a scalar Philox (8 ns) and compares it with p; for half types it rounds
that number first, and with it the probability. The stored mask then costs as much again. Here the comparison becomes
`random_bits.keep_mask`: vectorised, exact to 2**-32, and computed again in backward. On a GPU Philox takes about 34
instructions an element and the hash 14 (counted in the code for sm_90), and no mask is written and read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fuse_pass.inductor.compiler import (
    CallFunction,
    CustomGraphPass,
    Ignored,
    KeywordArg,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)
from fuse_pass.inductor.private import prims
from fuse_pass.joint.recompute import recompute_in_backward
from fuse_pass.numerics import random_bits

aten = torch.ops.aten

_patterns = PatternMatcherPass(pass_name="fuse_pass_dropout_masks")
_UNIFORM = CallFunction(prims.inductor_random.default, KeywordArg("size"), KeywordArg("seed"), "rand")
_ROUNDED = CallFunction(prims.convert_element_type.default, _UNIFORM, Ignored())


class OwnMasks(CustomGraphPass):
    """A pass over the joint graph, to run before those that look at masks; its identity is that of our sources."""

    def __call__(self, graph: Graph) -> None:
        before = set(graph.nodes)
        if _patterns.apply(graph):
            for node in graph.nodes:
                if node not in before:
                    _recompute(node)

    def uuid(self) -> Any:
        return "fuse_pass.joint.dropout_masks"


def _recompute(node: Node) -> None:
    """A stored mask costs more than a new one; 0-d tensors come from the seed, which is kept."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.dim() > 0:
        recompute_in_backward(node)


def _is_dropout(match: Match) -> bool:
    # By name: the graph carries a copy of the op.
    origin = str(match.output_node().meta.get("original_aten"))
    return origin == str(aten.native_dropout.default) and bool(match.kwargs["size"])


def _keep_mask(match: Match, size: Any, seed: Node, p: float) -> None:
    def keep(size: list[Any], seed: Tensor) -> Tensor:
        rows = 1
        for length in size[:-1]:
            rows = rows * length
        return random_bits.keep_mask(seed, rows, size[-1], p).view(size)

    match.replace_by_example(keep, [size, seed])


for _number in (_UNIFORM, _ROUNDED):
    register_graph_pattern(
        CallFunction(aten.gt.Scalar, _number, KeywordArg("p")), extra_check=_is_dropout, pass_dict=_patterns
    )(_keep_mask)
