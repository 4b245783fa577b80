"""The backend as users meet it: configuration, options, failures, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_pass
from fuse_pass import FuseBackend, backend, fuse_backend
from fuse_pass.graph.edit import Editor
from fuse_pass.inductor import compiler
from fuse_pass.patterns import Candidate
from tests.capture import capture


class Mlp(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 20), nn.Linear(20, 6), nn.LayerNorm(6)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


BOTH = {"dense_act_dense": 1, "dropout_norm": 1}


def test_equality_and_hash_follow_the_configuration() -> None:
    assert FuseBackend() == fuse_backend
    assert hash(FuseBackend()) == hash(fuse_backend)
    names = ["dense", "dropout_norm", "dense_act_dense", "gated_dense"]
    assert FuseBackend(names) == fuse_backend, "order does not matter"
    assert FuseBackend(["dropout_norm"]) != fuse_backend
    assert FuseBackend(strict=True) != fuse_backend
    assert FuseBackend(prepack=True) != fuse_backend
    assert FuseBackend(memory="smallest") != fuse_backend == FuseBackend(memory="balanced")
    assert fuse_backend != "fuse_pass"
    assert "dropout_norm" in repr(FuseBackend(["dropout_norm"]))
    assert copy.deepcopy(fuse_backend) == fuse_backend == pickle.loads(pickle.dumps(fuse_backend))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patterns": ["dense_gelu"]}, ValueError, "unknown pattern 'dense_gelu'; valid names are gated_dense, dense"),
        ({"patterns": "dropout_norm"}, TypeError, "collection of names"),
        ({"patterns": 5}, TypeError, r"expected a collection of names such as \['dense'\], got 5"),
        ({"patterns": b"dense"}, TypeError, r"expected a collection of names such as \['dense'\], got b'dense'"),
        ({"patterns": [3]}, TypeError, "patterns: expected names such as 'dense', got 3"),
        ({"patterns": ["dense", ["dense"]]}, TypeError, r"patterns: expected names such as 'dense', got \['dense'\]"),
        ({"strict": 1}, TypeError, "strict: expected a bool, got 1"),
        ({"prepack": "yes"}, TypeError, "prepack: expected a bool, got 'yes'"),
        ({"memory": "least"}, ValueError, "unknown setting 'least' of memory; valid are fastest, balanced, smallest"),
    ],
)
def test_bad_configuration(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FuseBackend(**arguments)


@pytest.mark.parametrize("name", ["fuse_pass", "fuse_pass_backend"])
def test_backend_by_name(name: str) -> None:
    model, x = Mlp().eval(), torch.randn(5, 6)
    with fuse_pass.collect() as report, torch.no_grad():
        y = torch.compile(model, backend=name, fullgraph=True)(x)
    assert report.counts() == BOTH
    torch.testing.assert_close(y, model(x))


def test_patterns_can_be_chosen() -> None:
    model, x = Mlp(), torch.randn(5, 6)
    for names in (["dense_act_dense"], ["dropout_norm"], []):
        chosen = capture(model, x, backend=FuseBackend(names, strict=True)).report
        assert chosen.counts() == dict.fromkeys(names, 1)


def test_options_are_separated() -> None:
    own, rest = backend.split_options({"strict": True, "max_autotune": False, "triton.cudagraphs": False})
    assert own == {"strict": True}
    assert rest == {"max_autotune": False, "triton.cudagraphs": False}
    with pytest.raises(
        ValueError, match=r"unknown option 'max_autotone': fuse_pass knows patterns, quantize, memory, prepack, strict"
    ):
        backend.split_options({"max_autotone": True})
    with pytest.raises(TypeError, match="options: expected names such as 'max_autotune', got 5"):
        backend.split_options({5: 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="options: expected a mapping from names to values, got 5"):
        backend.split_options(5)  # type: ignore[arg-type]


def test_options_reach_inductor_and_us() -> None:
    seen: list[bool] = []

    def look(graph: torch.fx.Graph) -> None:
        seen.append(any(str(node.target).startswith("aten") for node in graph.nodes))

    model, x = Mlp().eval(), torch.randn(5, 6)
    options = {"patterns": ["dropout_norm"], "post_grad_custom_post_pass": look, "fx_graph_cache": False}
    with fuse_pass.collect() as report, torch.no_grad():
        torch.compile(model, backend=fuse_backend, options=options)(x)
    assert report.counts() == {"dropout_norm": 1}
    assert seen == [True]


def test_an_unknown_option_is_an_error_at_the_call() -> None:
    compiled = torch.compile(Mlp(), backend=fuse_backend, options={"max_autotone": True})
    with pytest.raises(Exception, match="unknown option 'max_autotone'"):
        compiled(torch.randn(5, 6))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode: str) -> None:
    model, x = Mlp().eval(), torch.randn(5, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=fuse_backend, mode=mode)(x), model(x))


def test_unknown_mode_is_an_error() -> None:
    with pytest.raises(Exception, match=r"[Uu]nrecognized mode"):
        torch.compile(Mlp(), backend=fuse_backend, mode="fastest")(torch.randn(5, 6))


def test_unmatched_graphs_are_handed_on_unchanged() -> None:
    def plain(x: Tensor) -> Tensor:
        return torch.sin(x) @ x

    captured = capture(plain, torch.randn(4, 4))
    assert captured.rewritten[0] is captured.originals[0]
    assert not captured.report.matches


def test_the_given_graph_is_never_changed() -> None:
    captured = capture(Mlp(0.1), torch.randn(5, 6))
    assert captured.report.counts() == BOTH
    assert captured.rewritten[0] is not captured.originals[0]
    assert not any("fuse_pass" in str(node.target) for node in captured.originals[0].graph.nodes)


def break_dropout_norm(monkeypatch: pytest.MonkeyPatch, replacement: Callable[[Editor, Candidate], None]) -> None:
    broken = {**backend._PATTERNS_BY_NAME}
    broken["dropout_norm"] = replace(broken["dropout_norm"], replace=replacement)
    monkeypatch.setattr(backend, "_PATTERNS_BY_NAME", broken)


def raise_key_error(editor: Editor, candidate: Candidate) -> None:
    raise KeyError("no such thing")


def wrong_dtype(editor: Editor, candidate: Candidate) -> None:
    with editor.at(candidate.outputs, candidate.nodes):
        wrong = editor.call("double", candidate.inputs["x"])
    editor.replace(candidate.anchor, wrong)


def unlinted(editor: Editor, candidate: Candidate) -> None:
    """Leaves a reader of a node that comes after it."""
    graph = candidate.anchor.graph
    late = graph.create_node("call_function", torch.relu, (candidate.anchor,))
    candidate.anchor.prev.args = (late,)


@pytest.mark.parametrize("failure", [raise_key_error, wrong_dtype, unlinted])
def test_a_failing_pattern_warns_once_and_the_model_runs(
    monkeypatch: pytest.MonkeyPatch, failure: Callable[[Editor, Candidate], None]
) -> None:
    break_dropout_norm(monkeypatch, failure)
    model, x = Mlp().eval(), torch.randn(5, 6)
    with warnings.catch_warnings(record=True) as caught, fuse_pass.collect() as report:
        warnings.simplefilter("always")
        y = torch.compile(model, backend=fuse_backend)(x)
    ours = [str(w.message) for w in caught if str(w.message).startswith("fuse_pass:")]
    assert len(ours) == 1
    assert ours[0].startswith("fuse_pass: pattern dropout_norm failed (")
    assert not report.matches
    torch.testing.assert_close(y, model(x))


def test_a_failing_pattern_raises_if_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    break_dropout_norm(monkeypatch, raise_key_error)
    with pytest.raises(Exception, match="no such thing"):
        torch.compile(Mlp(), backend=FuseBackend(strict=True))(torch.randn(5, 6))


@pytest.mark.parametrize("setting", ["fallback_random", "align_random_eager"])
def test_eager_random_numbers_are_respected(setting: str) -> None:
    if not compiler.is_inductor_option(setting):
        pytest.skip(f"this PyTorch has no option {setting}")
    model, x = Mlp(0.3), torch.randn(5, 6)
    with fuse_pass.collect() as report:
        torch.compile(model, backend=fuse_backend, options={setting: True})(x)
    assert report.counts() == {"dense_act_dense": 1}
    assert [decline.reason for decline in report.declines] == [fuse_pass.Reason.FALLBACK_RANDOM]


def test_fallback_random_gives_eager_values() -> None:
    model, x = Mlp(0.3), torch.randn(5, 6)
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    with torch._inductor.config.patch(fallback_random=True):
        torch.testing.assert_close(torch.compile(model, backend=fuse_backend)(x), expected)


def compiles_and_breaks(compile_backend: Any) -> tuple[int, int]:
    """Graphs and graph breaks of a run over several batch sizes and modes, in a model that breaks once by itself."""

    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Mlp(0.1), Mlp(0.1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Breaking()
    compiled = torch.compile(model, backend=compile_backend)
    for batch in (3, 5, 7):
        compiled(torch.randn(batch, 6)).sum().backward()
    model.eval()
    with torch.no_grad():
        compiled(torch.randn(4, 6))
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_no_more_graphs_or_breaks_than_stock() -> None:
    def rewrite_only(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        return fuse_backend.rewrite(gm)[0].forward

    assert compiles_and_breaks(rewrite_only) == compiles_and_breaks("eager")


@pytest.mark.slow
def test_no_more_graphs_or_breaks_than_inductor() -> None:
    assert compiles_and_breaks(fuse_backend) == compiles_and_breaks("inductor")


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("failing", [True, False])
def test_garbage_collector_rests_while_a_graph_is_rewritten(
    on: bool, failing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (graph,) = capture(Mlp(), torch.randn(3, 6)).originals
    seen: list[bool] = []

    def same_outputs(before: Any, after: Any) -> None:
        seen.append(gc.isenabled())
        if failing:
            raise RuntimeError("nonsense")

    monkeypatch.setattr(backend, "require_same_outputs", same_outputs)
    (gc.enable if on else gc.disable)()
    try:
        if failing:
            with pytest.raises(RuntimeError, match="nonsense"):
                FuseBackend(strict=True).rewrite(graph)
        else:
            FuseBackend(strict=True).rewrite(graph)
        assert gc.isenabled() == on
    finally:
        gc.enable()
    assert set(seen) == {False}


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dynamic_batch_does_not_recompile(p: float) -> None:
    model = Mlp(p)
    compiled = torch.compile(model, backend=fuse_backend, dynamic=True)
    compiled(torch.randn(3, 6)).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (5, 9, 16):
            y = compiled(torch.randn(batch, 6))
            y.sum().backward()
    assert y.shape == (16, 6)
