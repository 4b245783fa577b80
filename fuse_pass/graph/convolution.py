"""1×1 convolutions, which are Linear layers along dimension 1: `y[b, :, ...] = W x[b, :, ...] + b`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fuse_pass.graph.canonical import Op
from fuse_pass.graph.shapes import same_shape, same_size, value_of
from fuse_pass.graph.view import GraphView, Linear

CHANNELS = 1


def pointwise_layers(view: GraphView) -> dict[Node, Linear]:
    """Every batched 1×1 convolution by its node: kernel and stride 1, nothing padded; grouped ones included."""
    found = {}
    for node in view.nodes:
        op = view.op(node)
        if op is not None and op.kind == "conv" and _is_pointwise(op):
            layer = Linear(node, op["input"], op["weight"], op["bias"], False, (node,), CHANNELS)
            found[node] = layer
    return found


def _is_pointwise(op: Op) -> bool:
    x, weight = value_of(op["input"]), value_of(op["weight"])
    if x is None or weight is None or x.dim() != weight.dim():  # as many dimensions: there is a batch
        return False
    kernel_is_one = all(same_size(size, 1) for size in weight.shape[2:])
    nothing_padded = op["padding"] in ("same", "valid") or _all_equal(op["padding"], 0)
    return kernel_is_one and nothing_padded and _all_equal(op["stride"], 1)


def _all_equal(setting: Any, value: int) -> bool:
    values = setting if isinstance(setting, (tuple, list)) else (setting,)
    return all(isinstance(v, int) and v == value for v in values)


def is_grouped(view: GraphView, layer: Linear) -> bool:
    op = view.op(layer.node)
    return op is not None and op.kind == "conv" and op["groups"] != 1


def has_channels_last(value: torch.Tensor) -> bool:
    """Whether a batch of vectors lies in memory one vector after the other: channels_last, or a transposed view."""
    sizes = [value.shape[0], *value.shape[2:], value.shape[1]]
    strides = [value.stride(0), *value.stride()[2:], value.stride(1)]
    return same_shape(strides, contiguous_strides(sizes))


def contiguous_strides(sizes: Sequence[Any]) -> list[Any]:
    strides: list[Any] = []
    step: Any = 1
    for size in reversed(sizes):
        strides.insert(0, step)
        step = step * size
    return strides
