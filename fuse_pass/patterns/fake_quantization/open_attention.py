"""Opens attention that is one call in a graph, so that its inside can be quantised as `QuantizedMultiheadAttention` is.

`F.multi_head_attention_forward`, which `nn.MultiheadAttention` leaves in a graph, and
`F.scaled_dot_product_attention` become the operations of `numerics.attention`, with the bits of `convert`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fuse_pass.graph.record import Recorder
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import value_of
from fuse_pass.numerics.attention import (
    Heads,
    by_weights,
    joined_masks,
    multi_head_attention,
    scaled_dot_product_attention,
)
from fuse_pass.numerics.spec import Site
from fuse_pass.patterns.fake_quantization.inserter import Inserter
from fuse_pass.report import Reason


def _dot_product(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False,
    *, scale: Any = None, enable_gqa: Any = False,
) -> None: ...  # fmt: skip


def problem_of_multi_head(node: Node) -> Problem | None:
    """What keeps a call from being opened."""
    given = _arguments(node, F.multi_head_attention_forward)
    if given["static_k"] is not None or given["static_v"] is not None:
        return Problem(
            Reason.OPAQUE, "multi_head_attention_forward with keys or values from outside stays one call", node
        )
    for name in ("num_heads", "training", "need_weights", "average_attn_weights", "add_zero_attn"):
        if isinstance(given[name], Node):
            return Problem(Reason.CONSTANTS, f"{name} is known at run time only", node)
    if any(reader.target is not operator.getitem for reader in node.users):
        return Problem(Reason.OPAQUE, f"{node.name} is handed on as a tuple", node)
    return None


def open_multi_head(inserter: Inserter, node: Node) -> None:
    """Replaces one call of `F.multi_head_attention_forward`; query, key and value `[L, B, E]` or `[L, E]`."""
    given = _arguments(node, F.multi_head_attention_forward)
    batched = _value(given["query"]).dim() == 3
    with inserter.editor.before(node):
        operands = _quantized_operands(inserter, given, batched=batched)

    def record(recorder: Recorder, rounded: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
        tensors = {name: recorder.value_of(operand) for name, operand in operands.items()}
        attn_mask, padding = (recorder.value_of(given[name]) for name in ("attn_mask", "key_padding_mask"))
        query = tensors["query"]
        output, weights = multi_head_attention(
            query,
            tensors["key"],
            tensors["value"],
            _heads(tensors, given, recorder.value_of(given["dropout_p"])),
            joined_masks(attn_mask, padding, given["num_heads"], query.dtype),
            rounded,
            need_weights=given["need_weights"],
            average=given["average_attn_weights"],
        )
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1), weights

    results = inserter.open(node, record)
    for reader in list(node.users):
        index = reader.args[1]
        inserter.replace(reader, results[index], is_quantized=bool(index == 0))
    node.graph.erase_node(node)


def _quantized_operands(inserter: Inserter, given: dict[str, Any], *, batched: bool) -> dict[str, Node | None]:
    """Every tensor but the masks, as its product sees it; batch first."""
    sites = {
        "weight": ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight"),
        "bias": ("in_proj_bias", "bias_k", "bias_v", "out_proj_bias"),
    }
    found: dict[str, Node | None] = {}
    batch_first: dict[Node, Node] = {}
    for name in ("query", "key", "value"):
        source = given[name]
        if source not in batch_first:
            call = inserter.editor.call
            batch_first[source] = call("transpose", source, 0, 1) if batched else call("unsqueeze", source, 0)
        found[name] = _once(inserter, batch_first[source], inserter.spec.input)
    for site, names in sites.items():
        for name in names:
            found[name] = None if given[name] is None else _once(inserter, given[name], getattr(inserter.spec, site))
    return found


def _once(inserter: Inserter, node: Node, site: Site | None) -> Node:
    return node if site is None else inserter.once(node, site)


def _heads(tensors: dict[str, Any], given: dict[str, Any], dropout_p: Any) -> Heads:
    separate = (tensors["q_proj_weight"], tensors["k_proj_weight"], tensors["v_proj_weight"])
    bias = tensors["in_proj_bias"]
    return Heads(
        count=given["num_heads"],
        project=by_weights(
            separate if given["use_separate_proj_weight"] else tensors["in_proj_weight"].chunk(3),
            (None,) * 3 if bias is None else bias.chunk(3),
        ),
        project_context=lambda context: F.linear(context, tensors["out_proj_weight"], tensors["out_proj_bias"]),
        more_keys=None if tensors["bias_k"] is None else (tensors["bias_k"], tensors["bias_v"]),
        zero_key=given["add_zero_attn"],
        dropout_p=dropout_p,
        training=given["training"],
    )


def open_dot_product(inserter: Inserter, node: Node) -> Node:
    """Puts the operations of one call of `F.scaled_dot_product_attention` in its place; returns that of the context."""
    given = _arguments(node, _dot_product)

    def record(recorder: Recorder, rounded: Callable[[Tensor], Tensor]) -> tuple[Tensor]:
        arguments = {name: recorder.value_of(value) for name, value in given.items()}
        return (scaled_dot_product_attention(**arguments, rounded=rounded),)

    (context,) = inserter.open(node, record)
    return inserter.replace(node, context)


def _arguments(node: Node, function: Callable[..., Any]) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _value(node: Node) -> Tensor:
    value = value_of(node)
    assert value is not None
    return value
