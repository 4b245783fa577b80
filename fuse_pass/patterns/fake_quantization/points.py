"""What is quantised in a graph: operations, wherever they stand, and the elementwise layers of `torch.nn`.

Products, attention, embeddings and norms count in every spelling, as function, method or module. Activations, softmax
and pooling count where a module of exactly that type calls them, as `convert` swaps them: a function such as
`F.softmax` may be a step inside a larger operation, where rounding does harm (a mask of -inf would become the largest
number of a format without infinities). Dropout, additions and views are nowhere a point.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

Target = Callable[..., Any] | str


@dataclass(frozen=True)
class Point:
    """An operation whose operands and result are quantised.

    Attributes:
        kind: its name in the report.
        targets: what it looks like in a Dynamo graph; a string is a tensor method.
        operands: position, keyword and site of each operand.
    """

    kind: str
    targets: tuple[Target, ...]
    operands: tuple[tuple[int, str, str], ...]


def _operands(*sites: str, at: int = 0) -> tuple[tuple[int, str, str], ...]:
    """`input` first, then weight and bias from position `at` on."""
    rest = tuple((at + i, site, site) for i, site in enumerate(sites[1:]))
    return ((0, "input", sites[0]), *rest)


MULTI_HEAD = "multi-head attention"
_MATRICES = (torch.matmul, torch.mm, torch.bmm, operator.matmul, "matmul", "mm", "bmm", "__matmul__")
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_TRANSPOSED_F = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

POINTS: tuple[Point, ...] = (
    Point("linear", (F.linear,), _operands("input", "weight", "bias", at=1)),
    Point("conv", _CONVOLUTIONS, _operands("input", "weight", "bias", at=1)),
    Point("conv_transpose", (*_TRANSPOSED, *_TRANSPOSED_F), _operands("input", "weight", "bias", at=1)),
    Point("addmm", (torch.addmm, "addmm"), ((0, "input", "bias"), (1, "mat1", "input"), (2, "mat2", "weight"))),
    Point("matmul", _MATRICES, ((0, "input", "input"), (1, "other", "input"))),
    Point(
        "sdpa",
        (F.scaled_dot_product_attention,),
        ((0, "query", "input"), (1, "key", "input"), (2, "value", "input")),
    ),
    Point(MULTI_HEAD, (F.multi_head_attention_forward,), ()),
    Point("einsum", (torch.einsum, torch.functional.einsum), ((1, "", "input"), (2, "", "input"))),
    Point("embedding", (F.embedding, torch.embedding), ()),
    Point("layer_norm", (F.layer_norm, torch.layer_norm), _operands("input", "weight", "bias", at=2)),
    Point("rms_norm", (F.rms_norm, torch.rms_norm), _operands("input", "weight", at=2)),
    Point("group_norm", (F.group_norm, torch.group_norm), _operands("input", "weight", "bias", at=2)),
    Point("batch_norm", (F.batch_norm,), _operands("input", "weight", "bias", at=3)),
    Point("instance_norm", (F.instance_norm,), _operands("input", "weight", "bias", at=3)),
)

# What the forward of each layer is in a graph. Its hooks stand in the graph as calls of the same module.
_CALLS: dict[type[nn.Module], tuple[Target, ...]] = {
    nn.CELU: (F.celu, torch.celu, torch.celu_),
    nn.ELU: (F.elu,),
    nn.GELU: (F.gelu,),
    nn.GLU: (F.glu,),
    nn.Hardsigmoid: (F.hardsigmoid,),
    nn.Hardswish: (F.hardswish,),
    nn.Hardtanh: (F.hardtanh,),
    nn.LeakyReLU: (F.leaky_relu,),
    nn.LogSigmoid: (F.logsigmoid,),
    nn.LogSoftmax: (F.log_softmax,),
    nn.Mish: (F.mish,),
    nn.PReLU: (F.prelu, torch.prelu),
    nn.ReLU: (F.relu, torch.relu, torch.relu_),
    nn.ReLU6: (F.relu6, F.hardtanh),
    nn.SELU: (F.selu, torch.selu, torch.selu_),
    nn.SiLU: (F.silu,),
    nn.Sigmoid: (torch.sigmoid, F.sigmoid),
    nn.Softmax: (F.softmax,),
    nn.Softplus: (F.softplus,),
    nn.Softsign: (F.softsign,),
    nn.Tanh: (torch.tanh, F.tanh),
    nn.AdaptiveAvgPool1d: (F.adaptive_avg_pool1d,),
    nn.AdaptiveAvgPool2d: (F.adaptive_avg_pool2d,),
    nn.AdaptiveAvgPool3d: (F.adaptive_avg_pool3d,),
    nn.AdaptiveMaxPool1d: (F.adaptive_max_pool1d,),
    nn.AdaptiveMaxPool2d: (F.adaptive_max_pool2d,),
    nn.AdaptiveMaxPool3d: (F.adaptive_max_pool3d,),
    nn.AvgPool1d: (F.avg_pool1d,),
    nn.AvgPool2d: (F.avg_pool2d,),
    nn.AvgPool3d: (F.avg_pool3d,),
    nn.MaxPool1d: (F.max_pool1d,),
    nn.MaxPool2d: (F.max_pool2d,),
    nn.MaxPool3d: (F.max_pool3d,),
}


def _of_layer(kind: type[nn.Module], targets: tuple[Target, ...]) -> Point:
    return Point(kind.__name__, targets, _operands("input", "weight", at=1) if kind is nn.PReLU else _operands("input"))


LAYERS: Mapping[type[nn.Module], Point] = {kind: _of_layer(kind, targets) for kind, targets in _CALLS.items()}
"""The elementwise and pooling layers, by their exact type."""


def point_of(node: Node) -> Point | None:
    """What a node is quantised as, or None where it is left as it is."""
    if node.op not in ("call_function", "call_method"):
        return None
    try:
        point = _by_target().get(node.target)
    except TypeError:  # an unhashable callable is nobody's operation
        return None
    if point is not None:
        return point
    layer = LAYERS.get(_module_of(node))
    return layer if layer is not None and node.target in layer.targets else None


@functools.cache
def _by_target() -> dict[Any, Point]:
    return {target: point for point in POINTS for target in point.targets}


def _module_of(node: Node) -> Any:
    """The type of the innermost module whose code made the node."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][1] if stack else None
