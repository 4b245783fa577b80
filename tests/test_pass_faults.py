"""Whatever step of the pass fails: the untouched graph is compiled, with one warning, and the result is right."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

import fuse_pass
from fuse_pass import FuseBackend, backend
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.safety import Problem
from fuse_pass.patterns import Candidate, Pattern
from fuse_pass.report import Reason


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 20), nn.Linear(20, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


def fail(*arguments: Any, **options: Any) -> Any:
    raise KeyError("no such thing")


def find_raises_late(original: Callable[..., Iterator[Candidate]]) -> Callable[..., Iterator[Candidate]]:
    def find(*arguments: Any) -> Iterator[Candidate]:
        yield from original(*arguments)
        raise IndexError("at the end")

    return find


def find_gives(change: Callable[[Candidate], Any]) -> Callable[[Pattern], Pattern]:
    """A pattern whose search yields candidates that are not what they should be."""

    def broken(pattern: Pattern) -> Pattern:
        return replace(pattern, find=lambda *arguments: map(change, pattern.find(*arguments)))  # type: ignore[arg-type, return-value]

    return broken


def replace_by(replacement: Callable[[Editor, Candidate], None]) -> Callable[[Pattern], Pattern]:
    return lambda pattern: replace(pattern, replace=replacement)


def after_replace(corruption: Callable[[Graph, Candidate], None]) -> Callable[[Pattern], Pattern]:
    """The right replacement, and then something else."""

    def broken(pattern: Pattern) -> Pattern:
        def run(editor: Editor, candidate: Candidate) -> None:
            graph = candidate.anchor.graph
            pattern.replace(editor, candidate)
            corruption(graph, candidate)

        return replace(pattern, replace=run)

    return broken


def of_other_shape(editor: Editor, candidate: Candidate) -> None:
    with editor.at(candidate.outputs, candidate.nodes):
        wrong = editor.call("flatten", candidate.call.x)
    editor.replace(candidate.anchor, wrong)


def of_other_strides(editor: Editor, candidate: Candidate) -> None:
    with editor.at(candidate.outputs, candidate.nodes):
        there = editor.call("t", candidate.call.x)
        wrong = editor.call("t", editor.call("contiguous", there))
    editor.replace(candidate.anchor, wrong)


def of_other_dtype(editor: Editor, candidate: Candidate) -> None:
    with editor.at(candidate.outputs, candidate.nodes):
        wrong = editor.call("double", candidate.call.x)
    editor.replace(candidate.anchor, wrong)


def without_result(editor: Editor, candidate: Candidate) -> None:
    editor.erase(candidate.nodes)


def output_of(graph: Graph) -> Node:
    return graph.output_node()


def drops_an_output(graph: Graph, candidate: Candidate) -> None:
    output_of(graph).args = ((),)


def doubles_an_output(graph: Graph, candidate: Candidate) -> None:
    (results,) = output_of(graph).args
    output_of(graph).args = ((*results, *results),)  # type: ignore[misc, operator]


def forgets_example_value(graph: Graph, candidate: Candidate) -> None:
    for node in output_of(graph).all_input_nodes:
        node.meta.pop("example_value")


def falsifies_example_value(graph: Graph, candidate: Candidate) -> None:
    for node in output_of(graph).all_input_nodes:
        node.meta["example_value"] = node.meta["example_value"].double()


def reads_before_it_is_computed(graph: Graph, candidate: Candidate) -> None:
    first = next(node for node in graph.nodes if node.op == "call_function")
    late = graph.create_node("call_function", torch.relu, (first,))
    first.args = (late, *first.args[1:])


def calls_what_is_not_there(graph: Graph, candidate: Candidate) -> None:
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        graph.create_node("get_attr", "nothing_of_this_name")
        graph.create_node("call_module", "nothing_of_this_name")


BROKEN_PATTERNS: dict[str, Callable[[Pattern], Pattern]] = {
    "find raises": lambda pattern: replace(pattern, find=fail),
    "find raises after its last candidate": lambda pattern: replace(pattern, find=find_raises_late(pattern.find)),
    "find returns None": lambda pattern: replace(pattern, find=lambda *arguments: None),  # type: ignore[arg-type, return-value]
    "find yields a string": find_gives(lambda candidate: "nonsense"),
    "find yields a candidate without nodes": find_gives(lambda candidate: replace(candidate, nodes=frozenset())),
    "find forgets an input": find_gives(lambda candidate: replace(candidate, inputs={})),
    "find forgets the constants": find_gives(lambda candidate: replace(candidate, constants={})),
    "check raises": lambda pattern: replace(pattern, check=fail),
    "check returns nonsense": lambda pattern: replace(pattern, check=lambda *arguments: "nonsense"),  # type: ignore[arg-type, return-value]
    "replace raises": replace_by(fail),
    "replace leaves a hole": replace_by(without_result),
    "replace gives another shape": replace_by(of_other_shape),
    "replace gives other strides": replace_by(of_other_strides),
    "replace gives another dtype": replace_by(of_other_dtype),
    "an output is dropped": after_replace(drops_an_output),
    "an output is doubled": after_replace(doubles_an_output),
    "metadata is lost": after_replace(forgets_example_value),
    "metadata is false": after_replace(falsifies_example_value),
    "a value is read before it is computed": after_replace(reads_before_it_is_computed),
    "a module is called that is not there": after_replace(calls_what_is_not_there),
}


def warned_about(model: nn.Module, chosen: FuseBackend) -> list[str]:
    """Our warnings of one call, whose result must be eager's, from a graph without our ops."""
    x = torch.randn(5, 6)
    graphs: list[GraphModule] = []

    def compile_graph(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        before = str(gm.graph)
        fused, report = chosen.rewrite(gm)
        assert fused is gm, "expected the untouched graph"
        assert str(gm.graph) == before
        assert not report.matches
        graphs.append(gm)
        return gm.forward

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(torch.compile(model, backend=compile_graph)(x), model(x), rtol=0, atol=0)
    assert len(graphs) == 1
    return [str(w.message) for w in caught if str(w.message).startswith("fuse_pass:")]


@pytest.mark.parametrize("name", ["dense_act_dense", "dropout_norm"])
@pytest.mark.parametrize("fault", BROKEN_PATTERNS)
def test_a_broken_pattern(monkeypatch: pytest.MonkeyPatch, fault: str, name: str) -> None:
    patterns = backend._PATTERNS_BY_NAME
    monkeypatch.setattr(backend, "_PATTERNS_BY_NAME", {**patterns, name: BROKEN_PATTERNS[fault](patterns[name])})
    messages = warned_about(Block(), FuseBackend())
    assert len(messages) == 1, messages
    assert messages[0].startswith(f"fuse_pass: pattern {name} failed (")


@pytest.mark.parametrize(
    ("step", "broken"),
    [
        ("copy_graph_module", fail),
        ("copy_graph_module", lambda gm: None),
        ("hoist_scalars", fail),
        ("require_same_outputs", fail),
        ("apply", fail),
        ("apply", lambda *arguments: None),
        ("_recompiled", fail),
    ],
    ids=[
        "copy raises",
        "copy returns None",
        "hoist raises",
        "comparison raises",
        "apply raises",
        "apply returns None",
        "recompilation raises",
    ],
)
def test_a_broken_step(monkeypatch: pytest.MonkeyPatch, step: str, broken: Callable[..., Any]) -> None:
    monkeypatch.setattr(backend, step, broken)
    messages = warned_about(Block(), FuseBackend())
    assert len(messages) == 1, messages


def test_numbers_that_were_asked_for_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a fusion fails, the graph is compiled without fusions, but not without its fake quantisation."""
    model, x = Block(), torch.randn(5, 6)
    expected = fuse_pass.convert(model, "fp8_e4m3")(x)
    patterns = backend._PATTERNS_BY_NAME
    broken = replace(patterns["dropout_norm"], find=fail)
    monkeypatch.setattr(backend, "_PATTERNS_BY_NAME", {**patterns, "dropout_norm": broken})
    chosen = FuseBackend(quantize="fp8_e4m3")
    with pytest.warns(RuntimeWarning, match="fuse_pass: pattern dropout_norm failed"):
        y = torch.compile(model, backend=lambda gm, inputs: chosen.rewrite(gm)[0].forward)(x)
    assert not torch.equal(y, model(x))
    assert torch.equal(y, expected)


def test_a_decline_instead_of_a_failure_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def declines(view: Any, candidate: Candidate) -> Problem:
        return Problem(Reason.CONSTANTS, "not today", candidate.anchor)

    broken = {name: replace(p, check=declines) for name, p in backend._PATTERNS_BY_NAME.items()}
    monkeypatch.setattr(backend, "_PATTERNS_BY_NAME", broken)
    assert warned_about(Block(), FuseBackend()) == []


@pytest.mark.parametrize("fault", ["find raises", "replace gives another dtype", "metadata is false"])
def test_strict_raises(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    patterns = backend._PATTERNS_BY_NAME
    broken = BROKEN_PATTERNS[fault](patterns["dropout_norm"])
    monkeypatch.setattr(backend, "_PATTERNS_BY_NAME", {**patterns, "dropout_norm": broken})
    with pytest.raises(Exception, match=r"no such thing|expected dtype"):
        torch.compile(Block(), backend=FuseBackend(strict=True))(torch.randn(5, 6))


def test_a_failure_in_one_graph_does_not_keep_others_from_fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = backend._PATTERNS_BY_NAME
    monkeypatch.setattr(
        backend, "_PATTERNS_BY_NAME", {**patterns, "dropout_norm": replace(patterns["dropout_norm"], find=fail)}
    )
    assert len(warned_about(Block(), FuseBackend())) == 1
    monkeypatch.undo()
    torch._dynamo.reset()
    report = fuse_pass.coverage(Block(), torch.randn(5, 6))
    assert operator.itemgetter("dense_act_dense", "dropout_norm")(report.counts()) == (1, 1)


def writes_to_the_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Inductor of torch 2.13 fuses a write into the loop over the rows, and then looks for what it reads there.

    It fails so without us as well, e.g. for `softmax(tanh(sin(x) * cos(weight) + residual))`.
    """
    y = F.layer_norm(F.dropout(x, 0.25) + residual, (24,), weight, bias)
    residual.view(-1, 24).add_(1)
    return y


def test_what_inductor_cannot_compile_rewritten_is_compiled_as_it_was() -> None:
    x, residual = torch.zeros(3, 5, 24), torch.randn(3, 5, 24)
    weight, bias, before = torch.randn(24), torch.randn(24), residual.clone()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a later PyTorch may compile it
        y = torch.compile(writes_to_the_residual, backend=FuseBackend())(x, residual, weight, bias)
    torch.testing.assert_close(y, F.layer_norm(before, (24,), weight, bias))
    assert torch.equal(residual, before + 1)


def refuse_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor fails at every graph with an op of ours."""
    original = torch._inductor.graph.GraphLowering.codegen

    def codegen(self: Any) -> Any:
        if any("fuse_pass" in str(node.meta.get("original_aten")) for node in self.orig_gm.graph.nodes):
            raise KeyError("buf7")
        return original(self)

    monkeypatch.setattr(torch._inductor.graph.GraphLowering, "codegen", codegen)


@pytest.mark.parametrize(("training", "dynamic"), [(False, None), (True, None), (True, True)])
def test_a_failure_of_inductor_is_told_and_leaves_the_graph_as_it_was(
    monkeypatch: pytest.MonkeyPatch, training: bool, dynamic: bool | None
) -> None:
    refuse_rewritten(monkeypatch)
    model, x = Block(), torch.randn(5, 6)
    with torch._inductor.utils.fresh_inductor_cache(), torch.set_grad_enabled(training):
        with fuse_pass.collect() as report, pytest.warns(RuntimeWarning, match=r"cannot compile.*KeyError: 'buf7'"):
            y = torch.compile(model, backend=FuseBackend(), dynamic=dynamic)(x)
        torch.testing.assert_close(y, model(x))
        assert (report.matches, report.graphs) == ([], 1)
        assert [note.reason for note in report.notes] == [Reason.NOT_COMPILED]
        torch.compiler.reset()
        with pytest.raises(Exception, match="buf7"):
            torch.compile(model, backend=FuseBackend(strict=True))(x)
