"""Opens the layers of `fuse_pass.nn` that are one call in a graph, so that their parts are quantised as `convert` does.

`FusedDenseGELUDense` becomes Linear → GELU → Linear and `FusedDropoutLayerNorm` dropout → addition → LayerNorm. The
patterns, which run afterwards, fuse them again. `BitLinear` and `Int8Linear` round their operands themselves: they are
declined, as by `convert`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import value_of
from fuse_pass.ops.dropout_norm import LAYER_NORM
from fuse_pass.patterns.inserter import Inserter
from fuse_pass.patterns.points import LAYERS, POINTS, Point
from fuse_pass.report import Reason

_ops = torch.ops.fuse_pass
_BLOCKS = (_ops.dense_act_dense.default, _ops.dense_act_dense_inference.default)
_NORMS = (_ops.dropout_norm.default,)
_ROUNDING = (_ops.bit_linear.default, _ops.bit_linear_packed.default, _ops.llm_int8_linear.default)
LAYER_CALLS = (*_BLOCKS, *_NORMS, *_ROUNDING)
"""What a layer of `fuse_pass.nn` is in a graph."""

_LINEAR, _LAYER_NORM = (next(p for p in POINTS if p.kind == kind) for kind in ("linear", "layer_norm"))
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def _block(
    x: Any, weight1: Any, bias1: Any, weight2: Any, bias2: Any, act_weight: Any, seed: Any, p: Any, activation: Any,
    arguments: Any,
) -> None: ...  # fmt: skip


def _norm(
    x: Any, residual: Any, weight: Any, bias: Any, seed: Any, p: Any, eps: Any, normalized_dims: Any, norm: Any,
    norm_dtype: Any, residual_first: Any,
) -> None: ...  # fmt: skip


def problem_of_layer(node: Node) -> Problem | None:
    """What keeps a call of a layer from being opened."""
    name = str(node.target)
    if node.target in _ROUNDING:
        return Problem(Reason.NO_QUANTIZED_LAYER, f"{name} rounds its operands itself", node)
    try:
        given = _arguments(node)
    except TypeError:
        return Problem(Reason.OPAQUE, f"{name} is called with more than a layer gives it", node)
    if node.target in _BLOCKS:
        is_layer = given["activation"] in _APPROXIMATE and given["act_weight"] is None and given["seed"] is None
    else:
        is_layer = given["norm"] == LAYER_NORM and given["norm_dtype"] is None and given["residual_first"] is True
    return None if is_layer else Problem(Reason.OPAQUE, f"{name} is not called as a layer calls it", node)


def open_layer(inserter: Inserter, node: Node) -> list[tuple[Node, Point]]:
    """Puts the parts of a layer in the place of its call; returns those that are quantised, in order."""
    given = _arguments(node)
    if node.target in _BLOCKS:
        parts, results = _open_block(inserter, node, given)
    else:
        parts, results = _open_norm(inserter, node, given)
    if isinstance(node.meta["example_value"], (tuple, list)):
        for reader in list(node.users):
            inserter.replace(reader, results[reader.args[1]])  # type: ignore[index]
        node.graph.erase_node(node)
    else:
        inserter.replace(node, results[0])
    seed = given["seed"]
    if isinstance(seed, Node) and not seed.users:  # dropout draws its own
        seed.graph.erase_node(seed)
    return parts


_Opened = tuple[list[tuple[Node, Point]], Sequence[Node]]


def _open_block(inserter: Inserter, node: Node, given: dict[str, Any]) -> _Opened:
    call = inserter.editor.call
    with inserter.editor.before(node):
        h = call(F.linear, given["x"], given["weight1"], given["bias1"])
        a = call(F.gelu, h, approximate=_APPROXIMATE[given["activation"]])
        y = call(F.linear, a, given["weight2"], given["bias2"])
    return [(h, _LINEAR), (a, LAYERS[nn.GELU]), (y, _LINEAR)], [y]


def _open_norm(inserter: Inserter, node: Node, given: dict[str, Any]) -> _Opened:
    call: Callable[..., Node] = inserter.editor.call
    x, residual = given["x"], given["residual"]
    value = value_of(x)
    assert value is not None
    with inserter.editor.before(node):
        dropped = x if given["seed"] is None else call(F.dropout, x, given["p"], True)
        total = dropped if residual is None else call(operator.add, residual, dropped)
        shape = tuple(value.shape[value.dim() - given["normalized_dims"] :])
        y = call(F.layer_norm, total, shape, given["weight"], given["bias"], given["eps"])
    return [(y, _LAYER_NORM)], [y, total]


def _arguments(node: Node) -> dict[str, Any]:
    bound = inspect.signature(_block if node.target in _BLOCKS else _norm).bind(*node.args, **node.kwargs)
    return dict(bound.arguments)
