"""Opens the layers of `fuse_pass.nn` that are one call in a graph, so that their parts are quantised as `convert` does.

`FusedDenseGELUDense` becomes Linear → GELU → Linear and `FusedDropoutLayerNorm` dropout → addition → LayerNorm. The
patterns, which run afterwards, fuse them again. `BitLinear` and `Int8Linear` round their operands themselves: they are
declined, as by `convert`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import value_of
from fuse_pass.ops.arguments import Role
from fuse_pass.ops.bit_linear import BitLinear, BitLinearPacked
from fuse_pass.ops.dense_act_dense import Between, DenseActDense
from fuse_pass.ops.dropout_norm import LAYER_NORM, DropoutNorm, Settings
from fuse_pass.ops.fused_op import FusedOp, declaration_of
from fuse_pass.ops.llm_int8 import LlmInt8Linear
from fuse_pass.patterns.fake_quantization.inserter import Inserter
from fuse_pass.patterns.fake_quantization.points import LAYERS, POINTS, Point
from fuse_pass.report import Reason

_ROUNDING = (BitLinear, BitLinearPacked, LlmInt8Linear)
_LINEAR, _LAYER_NORM = (next(p for p in POINTS if p.kind == kind) for kind in ("linear", "layer_norm"))
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def is_layer_call(node: Node) -> bool:
    """Whether a node is what a layer of `fuse_pass.nn` is in a graph."""
    op = declaration_of(node.target)
    return op is not None and issubclass(op, (DenseActDense, DropoutNorm, *_ROUNDING))


def _call_of(node: Node) -> FusedOp:
    op = declaration_of(node.target)
    assert op is not None
    return op.of_call(node.args, node.kwargs)


def problem_of_layer(node: Node) -> Problem | None:
    """What keeps a call of a layer from being opened."""
    call = _call_of(node)
    if isinstance(call, _ROUNDING):
        return Problem(Reason.NO_QUANTIZED_LAYER, f"{node.target} rounds its operands itself", node)
    if isinstance(call, DenseActDense):
        given = call.between
        is_layer = given == Between(None, None, given.p, given.activation, given.act_arguments)
        is_layer = is_layer and given.activation in _APPROXIMATE and not getattr(call, "prepack", False)
    else:
        assert isinstance(call, DropoutNorm)
        norm = call.settings
        is_layer = norm == Settings(norm.seed, norm.p, norm.eps, norm.normalized_dims, LAYER_NORM, None, True)
    return None if is_layer else Problem(Reason.OPAQUE, f"{node.target} is not called as a layer calls it", node)


def open_layer(inserter: Inserter, node: Node) -> list[tuple[Node, Point]]:
    """Puts the parts of a layer in the place of its call; returns those that are quantised, in order."""
    call = _call_of(node)
    if isinstance(call, DenseActDense):
        parts, results = _open_block(inserter, node, call)
    else:
        assert isinstance(call, DropoutNorm)
        parts, results = _open_norm(inserter, node, call)
    if isinstance(node.meta["example_value"], (tuple, list)):
        for reader in list(node.users):
            inserter.replace(reader, results[reader.args[1]])  # type: ignore[index]
        node.graph.erase_node(node)
    else:
        inserter.replace(node, results[0])
    for seed in call.of_role(Role.SEED):
        if not seed.users:  # dropout draws its own
            seed.graph.erase_node(seed)
    return parts


_Opened = tuple[list[tuple[Node, Point]], Sequence[Node]]


def _open_block(inserter: Inserter, node: Node, call: DenseActDense) -> _Opened:
    add = inserter.editor.call
    with inserter.editor.before(node):
        h = add(F.linear, call.x, call.weight1, call.bias1)
        a = add(F.gelu, h, approximate=_APPROXIMATE[call.between.activation])
        y = add(F.linear, a, call.weight2, call.bias2)
    return [(h, _LINEAR), (a, LAYERS[nn.GELU]), (y, _LINEAR)], [y]


def _open_norm(inserter: Inserter, node: Node, call: DropoutNorm) -> _Opened:
    add: Callable[..., Node] = inserter.editor.call
    x: Any = call.x
    value = value_of(x)
    assert value is not None
    with inserter.editor.before(node):
        dropped = x if call.settings.seed is None else add(F.dropout, x, call.settings.p, True)
        total = dropped if call.residual is None else add(operator.add, call.residual, dropped)
        shape = tuple(call.settings.row_of(value))
        y = add(F.layer_norm, total, shape, call.weight, call.bias, call.settings.eps)
    return [(y, _LAYER_NORM)], [y, total]
