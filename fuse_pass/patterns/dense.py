"""Every other Linear, where another library multiplies faster:  `y = x Wᵀ + b`, in inference also `y = act(x Wᵀ + b)`.

Shapes: x `[..., d_in]`, W `[d_out, d_in]`, y `[..., d_out]`; the bias is optional.

Applied last, to what no other pattern took: attention projections, heads, lone layers. A Linear that is as fast with
PyTorch's own choice (small and thin ones, most dtypes and devices) is no candidate at all: it stays as it is and is not
reported. A residual that is added stays outside, since Inductor adds it in the norm that follows at no cost.

Declines when: the result is no contiguous tensor; a tensor is a subclass or on another device; the layer lies inside a
functorch transform or a higher-order op that is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fuse_pass.gemm.problem import GemmProblem
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import same_shape, value_of
from fuse_pass.graph.view import GraphView, Linear
from fuse_pass.inductor import private
from fuse_pass.numerics.tensors import is_column_major
from fuse_pass.ops.dense import Dense, DenseAct
from fuse_pass.patterns.activation_forms import FoundActivation, activation_at
from fuse_pass.patterns.linear_chain import weight_of
from fuse_pass.patterns.pattern import Candidate, Pattern, Situation, insert, tensor
from fuse_pass.patterns.spellings.dense import CORPUS
from fuse_pass.report import Reason


@dataclass(frozen=True, kw_only=True)
class PlainDense(Candidate[Dense]):
    layer: Linear


def find(view: GraphView, taken: Set[Node], situation: Situation) -> Iterator[PlainDense]:
    for layer in view.linears.values():
        if is_candidate(layer, situation):
            activation = _activation_after(view, layer)
            if activation is not None and is_candidate(layer, situation, act=activation.name):
                yield _found(layer, activation)
            else:
                yield _found(layer, None)


def is_candidate(layer: Linear, situation: Situation, *, act: str = "") -> bool:
    """Whether a Linear, with an activation after it or without, is faster as ours."""
    problem = _problem(layer, act)
    return problem is not None and situation.pays(problem)


def _problem(layer: Linear, act: str) -> GemmProblem | None:
    """The product of a Linear; None where a bias is added in another dtype than it has, or rows differ.

    The rows of a nested tensor have sizes of which nothing is known.
    """
    x, product, y = value_of(layer.input), value_of(layer.nodes[0]), value_of(layer.node)
    bias, weight = value_of(layer.bias), value_of(layer.weight)
    if x is None or weight is None or product is None or y is None or product.dtype is not y.dtype or y.is_nested:
        return None
    if len(layer.nodes) > 1 and bias is not None and bias.dtype is not y.dtype:
        return None
    column_major = is_column_major(weight.t() if layer.transposed else weight)
    sizes = math.prod(y.shape[:-1]), y.shape[-1], x.shape[-1]
    # Under autocast the dtype of the result is the one in which the product is computed.
    return GemmProblem(y.device, y.dtype, sizes, column_major=column_major, activation=act)


def _activation_after(view: GraphView, layer: Linear) -> FoundActivation | None:
    """An activation that alone reads the layer, in inference: backward needs its input."""
    value = value_of(layer.node)
    if len(layer.node.users) != 1 or value is None or value.requires_grad:
        return None
    activation = activation_at(view, next(iter(layer.node.users)))
    if activation is None or activation.problem is not None or activation.input is not layer.node:
        return None
    is_known = not activation.learned and not any(isinstance(argument, Node) for argument in activation.arguments)
    return activation if is_known and len(activation.nodes) == 1 else None


def _found(layer: Linear, activation: FoundActivation | None) -> PlainDense:
    anchor = layer.node if activation is None else activation.nodes[0]
    weight = value_of(layer.weight)
    assert weight is not None
    d_out, d_in = weight.shape[::-1] if layer.transposed else weight.shape
    given = (tensor(layer.input), tensor(layer.weight), tensor(layer.bias))
    return PlainDense(
        anchor=anchor,
        nodes=frozenset((*layer.nodes, anchor)),
        outputs=(anchor,),
        call=Dense(*given) if activation is None else DenseAct(*given, activation.name, list(activation.arguments)),
        variant=f"{d_in} → {d_out}" + ("" if activation is None else f", {activation.name.replace('_', ' ')}"),
        layer=layer,
    )


def check(view: GraphView, candidate: Candidate[Any]) -> Problem | None:
    y = value_of(candidate.anchor)
    if y is None or not same_shape(y.stride(), private.contiguous_strides_of(y.shape)):
        return Problem(Reason.LAYOUT, f"{candidate.anchor.name} is not contiguous", candidate.anchor)
    return None


def replace(editor: Editor, match: PlainDense) -> None:
    y_value = value_of(match.anchor)
    assert y_value is not None
    with editor.at(match.outputs, match.nodes):
        call = match.call.replaced({"weight": weight_of(editor, match.layer, flatten=False)})
        (y,) = insert(editor, call, draws=False, like=y_value)
    editor.replace(match.anchor, y)
    editor.erase(match.nodes)


PATTERN = Pattern("dense", find, check, replace, CORPUS)
