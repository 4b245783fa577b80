"""Opens `nn.MultiheadAttention`, one call in a graph, where its projections are faster as `dense`.

In its place come the operations that PyTorch itself would run, with the same random numbers: those of
`F.multi_head_attention_forward`, traced before autocast and autograd look at them. A call whose projections are as fast
in PyTorch's own library stays as it is and is not reported.

Declines when: a setting is known at run time only; the results are handed on as one tuple; a tensor is a subclass; the
call lies inside a functorch transform.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fuse_pass.graph.edit import Editor
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import is_plain, value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.patterns import dense
from fuse_pass.patterns.pattern import Situation, decline_of
from fuse_pass.report import Reason, Report


def open_where_it_pays(graph: Graph, situation: Situation) -> Report:
    """Opens calls in one graph, in place; the report says only what could not be opened."""
    report = Report()
    calls = graph.find_nodes(op="call_function", target=F.multi_head_attention_forward)
    if not calls or situation.body_of is not None:
        return report
    view = GraphView(graph, situation.autocast)
    editor = Editor(view)
    for node in calls:
        given = _arguments(node)
        problem = _problem(view, node, given)
        if problem is None:
            _open(editor, node, given, situation)
        else:
            report.declines.append(decline_of(dense.PATTERN.name, frozenset((node,)), node, problem))
    return report


def _arguments(node: Node) -> dict[str, Any]:
    bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    if given["training"] is False:
        given["dropout_p"] = 0.0
    return given


def _problem(view: GraphView, node: Node, given: dict[str, Any]) -> Problem | None:
    if view.is_in_functorch(node):
        return Problem(Reason.FUNCTORCH, f"{node.name} is batched or differentiated by torch.func", node)
    for name, argument in given.items():
        value = value_of(argument)
        if isinstance(argument, Node) and value is None:
            return Problem(Reason.CONSTANTS, f"{name} is known at run time only", node)
        if value is not None and not is_plain(value):
            return Problem(Reason.SUBCLASS, f"{name} is a {type(value).__name__} of layout {value.layout}", node)
    for reader in node.users:
        if reader.target is not operator.getitem or value_of(reader) is None:
            return Problem(Reason.OPAQUE, f"{node.name} is handed on as a tuple", node)
    return None


def _open(editor: Editor, node: Node, given: dict[str, Any], situation: Situation) -> None:
    tensors = list(dict.fromkeys(argument for argument in given.values() if isinstance(argument, Node)))

    def call(*values: Tensor) -> Any:
        return F.multi_head_attention_forward(**map_arg(given, dict(zip(tensors, values, strict=True)).__getitem__))

    with editor.before(node):
        traced = editor.trace(call, *tensors, pre_dispatch=True)
        if not any(dense.is_candidate(layer, situation) for layer in GraphView(traced).linears.values()):
            return
        last = node.prev
        results = editor.inline(traced, *tensors)
    needs_gradients = any(_requires_grad(reader) for reader in node.users)
    while (last := last.next) is not node:
        _pass_on_gradients(last, needs_gradients)
    readers = list(node.users)
    for reader in readers:
        editor.replace(reader, results[reader.args[1]])
    editor.erase((node, *readers))


def _pass_on_gradients(node: Node, needed: bool) -> None:
    """Fake values are computed without gradients; a pattern must still see which operations have one."""
    value = value_of(node)
    if needed and value is not None and value.is_floating_point():
        value.requires_grad_(any(_requires_grad(source) for source in node.all_input_nodes))


def _requires_grad(node: Node) -> bool:
    value = value_of(node)
    return value is not None and value.requires_grad
