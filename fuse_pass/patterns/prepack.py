"""Linear layers in inference whose weights may be kept a second time, packed (see `gemm.packed_weights`).

    y = act(x Wᵀ + b),  W a Parameter `[d_out, d_in]` that is read as it is

Applied last and only where the user asks for it, to plain layers and to what the other patterns have put in their
place. What runs with gradients, under autocast (which casts the weight in every call), with a weight that the graph
writes into, takes a view of or stores `[d_in, d_out]`, or with a small one, is no candidate and stays as it is.

Declines when: a tensor is a subclass or on another device; the layer lies inside a functorch transform or a
higher-order op that is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch.fx import Node

from fuse_pass.gemm.product import packing_pays
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import is_plain, value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.ops.arguments import Role, arguments_of
from fuse_pass.ops.dense import Dense
from fuse_pass.ops.fused_op import FusedOp, declaration_of
from fuse_pass.ops.prepacked import DensePrepacked
from fuse_pass.patterns import dense
from fuse_pass.patterns.pattern import Candidate, Pattern, Situation, insert, tensor


def find(view: GraphView, taken: Set[Node], situation: Situation) -> Iterator[Candidate[FusedOp]]:
    for node in view.nodes:
        y = value_of(node)
        call = None if y is None or y.requires_grad else _call_at(view, node)
        weights = [] if call is None else call.of_role(Role.WEIGHT)
        if call is not None and weights and all(_may_be_kept(view, weight, y) for weight in weights):
            yield _found(node, call, weights)


def _call_at(view: GraphView, node: Node) -> FusedOp | None:
    """What a node is as an op of ours: as one that it is already, or as the Linear that no other pattern took."""
    op, layer = declaration_of(node.target), view.linears.get(node)
    if op is not None:
        return op.of_call(node.args, node.kwargs)
    if layer is None or layer.transposed or layer.nodes != (node,):
        return None
    return Dense(tensor(layer.input), tensor(layer.weight), tensor(layer.bias))


def _may_be_kept(view: GraphView, weight: Any, y: torch.Tensor | None) -> bool:
    value = value_of(weight)
    return (
        y is not None
        and isinstance(weight, Node)
        and weight.op in ("placeholder", "get_attr")
        and isinstance(value, torch.nn.Parameter)
        and is_plain(value)
        and value.dtype is y.dtype
        and value.is_contiguous()
        and view.last_write(value) is None
        and packing_pays(value, math.prod(y.shape[:-1]))
    )


def _found(node: Node, call: FusedOp, weights: list[Node]) -> Candidate[FusedOp]:
    sizes = [value.shape for weight in weights if (value := value_of(weight)) is not None]
    return Candidate(
        anchor=node,
        nodes=frozenset((node,)),
        outputs=(node,),
        call=call.replaced({"prepack": True}) if _packs_itself(call) else DensePrepacked(*call.arguments()),
        variant=", ".join(f"{d_in} → {d_out}" for d_out, d_in in sizes),
    )


def _packs_itself(call: FusedOp) -> bool:
    """Whether an op of ours has that as a setting; others are one product."""
    return any(argument.name == "prepack" for argument in arguments_of(type(call)))


def check(view: GraphView, candidate: Candidate[FusedOp]) -> Problem | None:
    return None if _packs_itself(candidate.call) else dense.check(view, candidate)


def replace(editor: Editor, candidate: Candidate[FusedOp]) -> None:
    y_value = value_of(candidate.anchor)
    assert y_value is not None
    with editor.at(candidate.outputs, candidate.nodes):
        (y,) = insert(editor, candidate.call, draws=False, like=y_value)
    editor.replace(candidate.anchor, y)
    editor.erase(candidate.nodes)


PATTERN = Pattern("prepack", find, check, replace, dense.PATTERN.corpus)
