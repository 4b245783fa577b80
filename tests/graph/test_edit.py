"""Copying, inserting and replacing, with the metadata that AOTAutograd needs; a false replacement raises."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fuse_pass.graph.edit import Editor, RewriteError, copy_graph_module, require_same_outputs
from fuse_pass.graph.view import GraphView
from tests.graph.dynamo import graph_of, result_of, view_of

X = torch.randn(3, 5, 8, requires_grad=True)


def test_copies_share_parameters_and_notes_but_no_nodes() -> None:
    with torch._dynamo.config.patch(caching_precompile=True):
        original = graph_of(torch.nn.Linear(8, 4), X)
    copy = copy_graph_module(original)
    assert copy is not original
    assert copy.code == original.code
    assert copy.meta == original.meta
    for name in ("_param_name_to_source", "_backend_id", "compile_subgraph_reason"):
        assert getattr(copy, name) is getattr(original, name)
    for old, new in zip(original.graph.nodes, copy.graph.nodes, strict=True):
        assert old is not new
        assert old.name == new.name
        assert old.meta == new.meta
        assert getattr(old, "_dynamo_source", 0) is getattr(new, "_dynamo_source", 0)
    assert any(hasattr(node, "_dynamo_source") for node in copy.graph.nodes)


def test_copies_can_change_without_the_original() -> None:
    original = graph_of(lambda x: checkpoint(torch.sin, x, use_reentrant=False) * 2, X)
    before = original.print_readable(print_output=False)
    copy = copy_graph_module(original)
    modules = [module for module in copy.modules() if isinstance(module, GraphModule)]
    assert len(modules) == 2
    for module in modules:
        for node in module.graph.nodes:
            if node.target in (torch.sin, operator.mul):
                node.target = {torch.sin: torch.cos, operator.mul: operator.add}[node.target]
                node.meta["changed"] = True
        module.recompile()
    assert original.print_readable(print_output=False) == before
    assert not any("changed" in node.meta for module in original.modules() for node in getattr(module, "graph").nodes)  # noqa: B009
    torch.testing.assert_close(copy(X)[0], torch.cos(X) + 2)
    torch.testing.assert_close(original(X)[0], torch.sin(X) * 2)


def replace_result(function: Any, target: Any, *arguments: Any, x: Tensor = X) -> GraphModule:
    """Replaces the result of `function(x)` by `target(x, *arguments)`."""
    original = graph_of(function, x)
    module = copy_graph_module(original)
    view = GraphView(module.graph)
    old, editor = result_of(view), Editor(view)
    (source,) = module.graph.find_nodes(op="placeholder")
    with editor.at([old], [old]):
        new = editor.call(target, source, *arguments)
    editor.replace(old, new)
    editor.erase([old])
    require_same_outputs(original, module)
    module.recompile()
    return module


def test_replacement() -> None:
    module = replace_result(torch.sin, torch.cos)
    assert torch.equal(module(X)[0], torch.cos(X))
    node = result_of(GraphView(module.graph))
    assert node.meta["example_value"].shape == X.shape
    assert node.meta["example_value"].requires_grad
    assert "stack_trace" in node.meta


@pytest.mark.parametrize(
    ("what", "target", "arguments"),
    [
        ("shape", "flatten", ()),
        ("shape", "sum", (-1,)),
        ("shape", "unsqueeze", (0,)),
        ("dtype", "double", ()),
        ("dtype", "to", (torch.bfloat16,)),
        ("strides", torch.Tensor.contiguous, ()),
        ("device", "to", ("meta",)),
    ],
)
def test_replacements_with_other_metadata_raise(what: str, target: Any, arguments: tuple[Any, ...]) -> None:
    function = (lambda x: x * 2) if what == "strides" else torch.sin
    x = X.detach().transpose(0, 1).requires_grad_() if what == "strides" else X
    with pytest.raises(RewriteError, match=f"expected {what}"):
        replace_result(function, target, *arguments, x=x)


def calls_of_dense(monkeypatch: pytest.MonkeyPatch, *inputs: Tensor, dynamic: bool = False) -> tuple[list[Any], int]:
    """The fake values of a `dense` put before each product of a graph, and how often they were computed.

    The graph has the product of the last input under autocast, and then those of all.
    """
    weight = torch.randn(4, 8)

    def function(*xs: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            last = xs[-1] @ weight.t()
        return [last, *(x @ weight.t() for x in xs)]

    graph = graph_of(function, *inputs, dynamic=dynamic).graph
    editor, ran, values = Editor(GraphView(graph)), 0, []
    compute = editor._fake_result

    def count(*arguments: Any) -> Any:
        nonlocal ran
        ran += 1
        return compute(*arguments)

    monkeypatch.setattr(editor, "_fake_result", count)
    (weight_node,) = (node for node in graph.find_nodes(op="placeholder") if "weight" in node.name)
    for product in graph.find_nodes(op="call_function", target=operator.matmul):
        with editor.before(product):
            node = editor.call_ours(torch.ops.fuse_pass.dense.default, product.args[0], weight_node, None)
        values.append(node.meta["example_value"])
    return values, ran


def test_fake_kernels_run_once_for_like_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    values, ran = calls_of_dense(monkeypatch, *(torch.randn(3, 8) for _ in range(5)))
    assert ran == 2, "without autocast and with it"
    assert {tuple(value.shape) for value in values} == {(3, 4)}
    assert [value.dtype for value in values] == [torch.bfloat16, *[torch.float32] * 5]
    transposed = torch.randn(8, 2).t()
    values, ran = calls_of_dense(monkeypatch, torch.randn(3, 8), torch.randn(2, 8), transposed)
    assert ran == 4
    assert [tuple(value.shape) for value in values] == [(2, 4), (3, 4), (2, 4), (2, 4)]


def test_fake_kernels_run_for_every_call_with_symbolic_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    values, ran = calls_of_dense(monkeypatch, *(torch.randn(3, 8) for _ in range(2)), dynamic=True)
    assert ran == len(values) == 3


def test_replacement_by_a_tuple_raises() -> None:
    with pytest.raises(RewriteError, match="expected two tensors"):
        replace_result(torch.sin, torch.frexp)


def test_outputs_that_lose_their_gradient_raise() -> None:
    before, after = graph_of(lambda x: torch.sin(x), X), graph_of(lambda x: torch.sin(x.detach()), X)
    with pytest.raises(RewriteError, match="requires_grad"):
        require_same_outputs(before, after)
    with pytest.raises(RewriteError, match="expected 1 outputs, got 2"):
        require_same_outputs(before, graph_of(lambda x: (torch.sin(x), torch.cos(x)), X))


def test_insertion_is_before_the_first_reader_even_one_that_was_added_later() -> None:
    view = view_of(lambda x: (lambda s: (s * 2, torch.exp(s)))(torch.sin(x)), X)
    sine, product, exponential = (node for node in view.nodes if node.op == "call_function")
    editor = Editor(view)
    with editor.at([product], [product]):
        added = editor.call(operator.add, sine, 2)
    editor.replace(product, added)
    editor.erase([product])
    with editor.at([sine], [sine, exponential]):
        later = editor.call(torch.cos, view.nodes[0])
    assert sine < added
    assert later < added
    assert later.meta["example_value"].shape == X.shape


def test_current_follows_chains_of_replacements() -> None:
    view = view_of(lambda x: torch.sin(x) * 2, X)
    sine = next(node for node in view.nodes if node.target is torch.sin)
    editor = Editor(view)
    with editor.at([sine], [sine]):
        second = editor.call(torch.cos, sine.args[0])
        third = editor.call(torch.tan, sine.args[0])
    editor.replace(sine, second)
    editor.replace(second, third)
    assert editor.current(sine) is third
    assert editor.current(3) == 3


def test_erasing_takes_transposes_that_nobody_reads() -> None:
    def function(x: Tensor) -> Tensor:
        w = torch.ones(8, 8)
        return (x @ w.t()) + F.relu(x @ w.mT.contiguous()) * 0 + x

    view = view_of(function, X)
    product = next(node for node in view.nodes if node.target is operator.matmul)
    transpose = product.args[1]
    editor = Editor(view)
    with editor.at([product], [product]):
        new = editor.call(operator.mul, product.args[0], 1.0)
    editor.replace(product, new)
    editor.erase([product])
    assert transpose not in view.graph.nodes
    view.graph.lint()


def test_fake_values_follow_the_autocast_region() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x.mT

    view = view_of(function, X[0])
    product = next(node for node in view.nodes if node.target is operator.matmul)
    editor = Editor(view)
    with editor.at([product], [product]):
        inside = editor.call(F.linear, product.args[0], product.args[0])
    assert inside.meta["example_value"].dtype is torch.bfloat16


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_what_is_detached_stays_detached(pre_dispatch: bool) -> None:
    """torch 2.14 may record `detach` as `alias`, whose gradient is that of what it is an alias of."""
    module = copy_graph_module(graph_of(torch.sin, X))
    view = GraphView(module.graph)
    old, editor = result_of(view), Editor(view)
    with editor.before(old):
        (x,) = old.all_input_nodes
        traced = editor.trace(lambda x: x + x.detach() * 2, x, pre_dispatch=pre_dispatch)
        old.replace_all_uses_with(editor.inline(traced, x))
    calls = [node.target for node in traced.nodes if node.op == "call_function"]
    assert torch.ops.aten.detach.default in calls
    assert torch.ops.aten.alias.default not in calls
    module.graph.lint()
    module.recompile()
    x = torch.ones(3, 5, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x)[0].sum(), x)
    assert torch.equal(grad, torch.ones_like(x)), "and not 3"
