"""Where a graph says what its values are like: Dynamo's in `example_value`, those of `torch.export` in `val`.

The patterns read what Dynamo notes. A `val` does not tell whether its value requires a gradient: while gradients are
recorded all are taken to, so that what replaces an operation has a gradient as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph

from fuse_pass.inductor import private

_DYNAMO, _EXPORT = "example_value", "val"


def is_of_dynamo(graph: Graph) -> bool:
    """Whether values are noted as Dynamo does, or there is none: nothing goes in."""
    return not graph.find_nodes(op="placeholder") or any(_DYNAMO in node.meta for node in graph.nodes)


def is_of_export(graph: Graph) -> bool:
    """Whether values are noted, and none of them by Dynamo."""
    return not is_of_dynamo(graph) and any(_EXPORT in node.meta for node in graph.nodes)


def read_as_of_dynamo(graph: Graph) -> None:
    """Gives the nodes of a graph of `torch.export` the notes of Dynamo."""
    for node in graph.nodes:
        if _EXPORT in node.meta:
            node.meta[_DYNAMO] = private.tree_map(_with_gradient, node.meta[_EXPORT])


def write_as_of_export(graph: Graph) -> None:
    """The other way, for nodes that have been added too."""
    for node in graph.nodes:
        if _DYNAMO in node.meta:
            value = node.meta.pop(_DYNAMO)
            node.meta.setdefault(_EXPORT, value)


def _with_gradient(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if is_float and torch.is_grad_enabled() else value
