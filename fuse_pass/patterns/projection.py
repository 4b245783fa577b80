"""The gate or the up of a gated block: a Linear of its own, or one half of a merged one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from fuse_pass.graph.halves import Half, half_of
from fuse_pass.graph.shapes import value_of
from fuse_pass.graph.view import GraphView, Linear
from fuse_pass.patterns.trail import Trail


@dataclass(frozen=True)
class Projection:
    """A gate or an up: a Linear of its own, or one half of a merged one (`half` is then 0 or 1)."""

    layer: Linear
    format: list[int]
    half: int | None
    value: Node
    trail: Trail


def projection_at(view: GraphView, layers: Mapping[Node, Linear], node: Node) -> Projection | None:
    trail = Trail(view, node)
    format_of_half = trail.through_quantization()
    value = trail.end
    half = half_of(view, value)
    if half is not None:
        trail.past(half.nodes, half.source)
    hidden_format = trail.through_quantization()
    if format_of_half != hidden_format:
        hidden_format += format_of_half
    layer = layers.get(trail.end)
    if layer is None or (half is not None and not _is_along(half, layer.features)):
        return None
    return Projection(layer, hidden_format, None if half is None else half.index, value, trail)


def _is_along(half: Half, features: int) -> bool:
    value = value_of(half.source)
    return value is not None and half.dim == features % value.dim()
