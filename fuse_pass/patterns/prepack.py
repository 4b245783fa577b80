"""Linear layers in inference whose weights may be kept a second time, packed (see `fuse_pass.ops.prepacked`).

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

from fuse_pass.graph.edit import Editor
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import is_plain, value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.ops.dense import prepacking_pays
from fuse_pass.ops.fused_op import Role, arguments_of, declaration_of
from fuse_pass.patterns import dense
from fuse_pass.patterns.pattern import Candidate, Pattern


def find(view: GraphView, taken: Set[Node]) -> Iterator[Candidate]:
    for node in view.nodes:
        y = value_of(node)
        if y is None or y.requires_grad:
            continue
        op, layer = declaration_of(node.target), view.linears.get(node)
        if op is not None:
            weights = op.of_call(node.args, node.kwargs).of_role(Role.WEIGHT)
        else:
            weights = [layer.weight] if layer is not None and not layer.transposed and layer.nodes == (node,) else []
        packed = [weight for weight in weights if isinstance(weight, Node) and _may_be_kept(view, weight, y)]
        if packed and len(packed) == len(weights):
            yield _candidate(view, node, packed)


def _may_be_kept(view: GraphView, weight: Node, y: torch.Tensor) -> bool:
    value = value_of(weight)
    return (
        weight.op in ("placeholder", "get_attr")
        and isinstance(value, torch.nn.Parameter)
        and is_plain(value)
        and value.dtype is y.dtype
        and value.is_contiguous()
        and view.last_write(value) is None
        and prepacking_pays(value, math.prod(y.shape[:-1]))
    )


def _candidate(view: GraphView, node: Node, weights: list[Node]) -> Candidate:
    layer = view.linears.get(node)
    if layer is not None:
        arguments: tuple[Any, ...] = (layer.input, layer.weight, layer.bias)
    else:
        arguments = node.args
    sizes = [value.shape for weight in weights if (value := value_of(weight)) is not None]
    return Candidate(
        anchor=node,
        nodes=frozenset((node,)),
        outputs=(node,),
        inputs={f"input{i}": argument for i, argument in enumerate(arguments) if isinstance(argument, Node)},
        constants={"arguments": arguments},
        variant=", ".join(f"{d_in} → {d_out}" for d_out, d_in in sizes),
    )


def check(view: GraphView, candidate: Candidate) -> Problem | None:
    return None if _packs_itself(candidate.anchor) else dense.check(view, candidate)


def _packs_itself(node: Node) -> bool:
    """Whether an op of ours has that as a setting; others are one product."""
    op = declaration_of(node.target)
    return op is not None and any(argument.name == "prepack" for argument in arguments_of(op))


def replace(editor: Editor, candidate: Candidate) -> None:
    node, arguments = candidate.anchor, candidate.constants["arguments"]
    with editor.at(candidate.outputs, candidate.nodes):
        if _packs_itself(node):
            y = editor.call(node.target, *arguments, prepack=True)  # type: ignore[arg-type]
        else:
            y = editor.call(torch.ops.fuse_pass.dense_prepacked.default, *arguments)
    editor.replace(node, y)
    editor.erase(candidate.nodes)


PATTERN = Pattern(
    "prepack", find, check, replace, dense.reference, {"linear": dense.SPELLINGS["linear"]}, dense.example_inputs
)
