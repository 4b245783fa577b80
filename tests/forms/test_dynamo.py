"""Graph forms: what Dynamo hands to a backend. One test per form that the patterns read; a failure names the form."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fuse_pass
from fuse_pass import FixedFormat
from fuse_pass.graph.canonical import canonical, is_weight_transpose
from fuse_pass.graph.shapes import is_plain
from tests.graph.dynamo import graph_of

X = torch.randn(2, 3, 8)
ATTENTION = nn.MultiheadAttention(8, 2)


def calls(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op.startswith("call_")]


def names(nodes: list[Node]) -> list[str]:
    return [str(getattr(node.target, "__name__", node.target)) for node in nodes]


ONE_OPERATION: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "nn.Linear": ("linear", lambda: nn.Linear(8, 4)),
    "nn.GELU": ("gelu", nn.GELU),
    "nn.SiLU": ("silu", nn.SiLU),
    "nn.LayerNorm": ("layer_norm", lambda: nn.LayerNorm(8)),
    "nn.RMSNorm": ("rms_norm", lambda: nn.RMSNorm(8)),
    "nn.GroupNorm": ("group_norm", lambda: nn.GroupNorm(1, 3)),
    "nn.Dropout in training": ("dropout", lambda: nn.Dropout(0.1)),
    "nn.Dropout in evaluation": ("dropout", lambda: nn.Dropout(0.1).eval()),
    "nn.Conv1d": ("conv", lambda: nn.Conv1d(3, 4, 1)),
    "nn.TransformerEncoderLayer in evaluation": (
        "encoder_layer",
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False),
    ),
}


@pytest.mark.parametrize(("kind", "make"), ONE_OPERATION.values(), ids=ONE_OPERATION)
def test_module_is_one_operation(kind: str, make: Callable[[], nn.Module]) -> None:
    nodes = calls(graph_of(make(), X))
    ops = [canonical(node) for node in nodes]
    assert [op and op.kind for op in ops] == [kind], f"Dynamo no longer writes the module as one {kind}: {names(nodes)}"


ONE_CALL: dict[str, tuple[Any, Callable[[Tensor], Any]]] = {
    "sum": (operator.add, lambda x: x + x),
    "sum in place": (operator.iadd, lambda x: operator.iadd(x, 2)),
    "product": (operator.matmul, lambda x: x @ x[0, 0]),
    "method": ("view", lambda x: x.view(6, 8)),
    "attention": (F.scaled_dot_product_attention, lambda x: F.scaled_dot_product_attention(x, x, x)),
    "embedding": (F.embedding, lambda x: F.embedding(torch.zeros(3, dtype=torch.int64), x[0])),
    "batch norm": (F.batch_norm, lambda x: F.batch_norm(x, None, None, training=True)),
    "multi-head attention": (F.multi_head_attention_forward, lambda x: ATTENTION(x, x, x)[0]),
    "detach": ("detach", lambda x: x.detach() * x),
}


@pytest.mark.parametrize(("target", "function"), ONE_CALL.values(), ids=ONE_CALL)
def test_call_is_written_as_it_was_made(target: Any, function: Callable[[Tensor], Any]) -> None:
    nodes = calls(graph_of(function, X.clone()))
    assert target in [node.target for node in nodes], f"Dynamo no longer writes {target}, but {names(nodes)}"


@pytest.mark.parametrize("name", ["T", "mT", "H", "mH"])
def test_transposing_attribute(name: str) -> None:
    nodes = calls(graph_of(lambda w: getattr(w, name) * 2, torch.randn(3, 4)))
    assert is_weight_transpose(canonical(nodes[0])), f"Dynamo writes W.{name} in a way we do not know: {names(nodes)}"


def test_dropout_keeps_p_and_training() -> None:
    (node,) = calls(graph_of(nn.Dropout(0.1), X))
    op = canonical(node)
    assert op is not None
    assert (op["p"], op["training"]) == (0.1, True), f"a dropout's arguments have changed: {node.args}, {node.kwargs}"


# --- values


def test_values_are_fake_tensors_of_the_plain_class() -> None:
    gm = graph_of(nn.Linear(8, 4), X)
    for node in gm.graph.nodes:
        if node.op != "output":
            value = node.meta.get("example_value")
            assert isinstance(value, Tensor), f"{node.name}: no example_value in Dynamo's graph"
            assert is_plain(value), f"{node.name}: {type(value)} is no longer what a fake tensor was"


def test_parameters_are_placeholders_with_fake_parameters() -> None:
    placeholders = graph_of(nn.Linear(8, 4), X).graph.find_nodes(op="placeholder")
    kinds = [isinstance(node.meta["example_value"], nn.Parameter) for node in placeholders]
    assert sorted(kinds) == [False, True, True], "parameters no longer arrive as placeholders with fake parameters"


def test_results_know_whether_they_need_gradients() -> None:
    (node,) = calls(graph_of(nn.Linear(8, 4), X))
    assert node.meta["example_value"].requires_grad, "example_value no longer says requires_grad"


def test_varying_size_is_a_symbol_with_a_hint() -> None:
    (node,) = (n for n in calls(graph_of(lambda x: x * 2, X, dynamic=True)) if n.target is operator.mul)
    size = node.meta["example_value"].shape[0]
    assert isinstance(size, torch.SymInt), f"dynamic=True gives a size of {size!r}"
    assert size.node.hint == 2, "a SymInt's node.hint is no longer the size of the call"
    assert size.node.expr == size.node.expr, "a SymInt's node.expr no longer compares"


def test_varying_probability_is_read_by_item() -> None:
    nodes = calls(graph_of(nn.Dropout(0.1), X, dynamic=True))
    p = canonical(nodes[-1])["p"]  # type: ignore[index]
    if isinstance(p, Node):
        assert (p.op, p.target) == ("call_method", "item"), f"dynamic=True reads p by {p.target}, not by item()"
    else:
        assert p == 0.1, f"dynamic=True gives {p!r} for p"


# --- provenance


def test_placeholders_know_their_source() -> None:
    gm = graph_of(nn.Linear(8, 4), X)
    for node in gm.graph.find_nodes(op="placeholder"):
        assert hasattr(node, "_dynamo_source"), f"{node.name}: no _dynamo_source, which AOTAutograd's cache reads"


def test_module_stack_names_path_and_class() -> None:
    (node,) = calls(graph_of(nn.Sequential(nn.GELU()), X))
    stack = list(node.meta.get("nn_module_stack", {}).values())
    assert [kind.__name__ if isinstance(kind, type) else kind for _, kind in stack][-1] == "GELU", (
        f"nn_module_stack no longer ends in (path, class): {stack}"
    )


def test_stack_trace_names_the_file() -> None:
    (node,) = calls(graph_of(lambda x: x * 2, X))
    assert f'File "{__file__}"' in node.meta.get("stack_trace", ""), "stack_trace no longer names the user's file"


def test_graph_knows_why_it_ends() -> None:
    found: list[Any] = []

    def keep(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        found.append(gm.compile_subgraph_reason)
        return gm.forward

    def broken(x: Tensor) -> Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y * 3

    torch.compile(broken, backend=keep)(X)
    assert [reason.graph_break for reason in found] == [True, False], f"compile_subgraph_reason has changed: {found}"


# --- regions and bodies


def test_autocast_is_a_pair_of_nodes() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x.mT

    nodes = calls(graph_of(function, X))
    (enter,) = (node for node in nodes if node.target is torch.amp.autocast_mode._enter_autocast)
    (leave,) = (node for node in nodes if node.target is torch.amp.autocast_mode._exit_autocast)
    assert enter.args == ("cpu", torch.bfloat16, True, None), f"autocast's arguments are {enter.args}"
    assert leave.args == (enter,), "the end of an autocast region no longer names its beginning"


def test_grad_mode_is_a_pair_of_nodes() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return y + x

    switches = [n.args for n in calls(graph_of(function, X)) if n.target is torch._C._set_grad_enabled]
    assert switches == [(False,), (True,)], f"no_grad is no longer a pair of _set_grad_enabled: {switches}"


def test_transforms_are_nestings() -> None:
    found = names(calls(graph_of(torch.func.vmap(torch.sin), X)))
    nestings = [name for name in found if name.endswith("crement_nesting")]
    assert len(nestings) == 2, f"a transform no longer begins and ends by nodes of that name: {found}"
    assert nestings[0].endswith("_increment_nesting"), f"a transform begins by {nestings[0]}"


def body_of(function: Callable[..., Any], name: str) -> GraphModule:
    gm = graph_of(function, X)
    found = [node for node in calls(gm) if isinstance(node.target, torch._ops.HigherOrderOperator)]
    assert {node.target.name() for node in found} == {name}, f"expected calls of {name} alone: {names(calls(gm))}"  # type: ignore[union-attr]
    (body,) = (node for node in found[0].all_input_nodes if node.op == "get_attr")
    inner = getattr(gm, str(body.target))
    assert isinstance(inner, GraphModule), f"the body of {name} is no graph, but {type(inner)}"
    return inner


def test_checkpoint_is_a_call_with_a_body() -> None:
    body = body_of(lambda x: checkpoint(torch.sin, x, use_reentrant=False), "tag_activation_checkpoint")
    assert "sin" in names(calls(body)), "the body of a checkpoint no longer holds what is checkpointed"
    assert "_checkpoint_context_fn" not in body.meta, "a plain checkpoint looks like a selective one"


def _save(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_save)


def test_selective_checkpoint_notes_its_policy() -> None:
    def function(x: Tensor) -> Any:
        return checkpoint(torch.sin, x, use_reentrant=False, context_fn=_contexts)

    body = body_of(function, "tag_activation_checkpoint")
    assert "_checkpoint_context_fn" in body.meta, f"a selective checkpoint is not to be told by its body: {body.meta}"


@torch.compiler.nested_compile_region
def nested_sine(x: Tensor) -> Tensor:
    return x.sin()


def test_nested_region_is_a_call_with_a_body() -> None:
    body = body_of(lambda x: nested_sine(nested_sine(x)), "invoke_subgraph")
    assert "sin" in names(calls(body)), "the body of a nested region no longer holds its operations"


@pytest.mark.parametrize(
    "fmt", ["fp8_e4m3", "int8", "int8_asymmetric", "mxfp8", "fixed4_4"], ids=lambda fmt: f"quantized to {fmt}"
)
def test_quantized_layers_and_calls_are_traced_whole(fmt: str) -> None:
    """Dynamo reads our frozen dataclasses and their defaults, those that are created in traced code too."""
    fmt = fmt if fmt in fuse_pass.formats else FixedFormat(4, 4)  # type: ignore[assignment]
    layer = fuse_pass.convert(nn.Linear(8, 4), fmt)
    for function in (layer, lambda x: fuse_pass.fake_quantize(x, fmt)):
        whole = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.equal(whole(X), function(X))
