"""`quantize=` is never lost unnoticed: all the ways in which Dynamo leaves code to eager PyTorch, for both doors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fuse_pass
from fuse_pass import Reason
from fuse_pass.inductor import compiler
from tests import eager_code
from tests.eager_code import (
    LAYER,
    NO_GRAPH,
    THE_LIMIT,
    Compile,
    Model,
    X,
    a_break,
    both,
    disabled_block,
    disabled_function,
    disabled_layer,
    every,
    front,
    ours,
    plain,
    without_inductor,
)

__all__ = ["without_inductor"]  # a fixture


# --- the whole call ---------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("training", [True, False])
def test_calls_that_run_eagerly_are_errors(compiled_by: Compile, training: bool) -> None:
    model = Model().train(training)
    compiled = compiled_by(model, dynamic=False)
    with torch.set_grad_enabled(training):
        first = compiled(X)
        assert torch.equal(first, compiled(X))
        for stance in ("force_eager", "eager_on_recompile"):
            with (
                torch.compiler.set_stance(stance),
                pytest.raises(RuntimeError, match=f"({NO_GRAPH}|{LAYER}).*stance is {stance}"),
            ):
                compiled(torch.randn(5, 4))
        with torch.compiler.set_stance("eager_on_recompile"):
            assert torch.equal(compiled(X), first), "known sizes run their graphs"
        forced = torch.compiler.set_stance(force_backend="eager")
        with forced, pytest.raises(RuntimeError, match=f"{NO_GRAPH}.*stance is force_backend='eager'"):
            compiled(torch.randn(6, 4))
        assert torch.equal(compiled(X), first), "and the default stance is as before"
        assert compiled(torch.randn(7, 4)).shape == (7, 4)
    assert first.requires_grad == training


@both
def test_functions_too(compiled_by: Compile) -> None:
    weight = torch.randn(4, 4)
    compiled = compiled_by(lambda x: F.linear(x, weight))
    compiled(X)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match=NO_GRAPH):
        compiled(X)


@both
def test_a_first_call_that_only_looks_is_an_error(compiled_by: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.eval_frame, "_EXAMPLE_INPUTS", None)  # what earlier tests have shown
    with torch.compiler.set_stance("eager_then_compile"):
        compiled = compiled_by(Model())
        with pytest.raises(RuntimeError, match="stance is eager_then_compile"):
            compiled(X)
    compiled(X)


@both
def test_everything_behind_disable_is_an_error(compiled_by: Compile) -> None:
    model = Model()
    compiled = compiled_by(lambda x: disabled_layer(model, x))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=NO_GRAPH):
            compiled(X)


# --- the recompile limit ----------------------------------------------------------------------------------------------


@every
def test_the_recompile_limit(compiled_by: Compile) -> None:
    compiled = compiled_by(Model(), dynamic=False)
    for rows in (2, 3, 4):
        compiled(torch.randn(rows, 4))
    for rows in (5, 6, 5):
        with pytest.raises(RuntimeError, match=THE_LIMIT) as caught:
            compiled(torch.randn(rows, 4))
        assert isinstance(caught.value.__cause__, compiler.RecompileLimitHit)
    assert compiled(torch.randn(4, 4)).shape == (4, 4), "sizes that are compiled still run"
    with torch._dynamo.config.patch(recompile_limit=4):
        assert compiled(torch.randn(5, 4)).shape == (5, 4)
    assert torch._dynamo.config.fail_on_recompile_limit_hit is False


@both
def test_the_limit_of_a_function_after_a_graph_break(compiled_by: Compile) -> None:
    def changes_rows(model: Model, x: Tensor) -> Tensor:
        rows = int(x.sum() * 0) + model.rows  # type: ignore[operator]
        return x[:1].expand(rows, 4) + 0

    model = Model(changes_rows)
    compiled = compiled_by(model, dynamic=False)

    def call_with(rows: int) -> None:
        model.rows = rows
        compiled(X)

    call_with(2)
    with pytest.raises(RuntimeError, match=THE_LIMIT):
        list(map(call_with, range(3, 9)))


@both
def test_the_limit_where_errors_of_dynamo_are_suppressed(compiled_by: Compile) -> None:
    weight = torch.randn(4, 4)
    compiled = compiled_by(lambda x: F.linear(x, weight), dynamic=False)
    with torch._dynamo.config.patch(suppress_errors=True):
        for rows in (2, 3, 4):
            compiled(torch.randn(rows, 4))
        with pytest.raises(RuntimeError, match=NO_GRAPH):
            compiled(torch.randn(5, 4))


# --- parts of a call --------------------------------------------------------------------------------------------------


@both
def test_a_graph_break_is_told_once_per_place(compiled_by: Compile) -> None:
    model = Model(a_break)
    compiled = compiled_by(model)
    with warnings.catch_warnings(record=True) as caught, fuse_pass.collect() as report:
        warnings.simplefilter("default")
        first = compiled(X)
        compiled(torch.randn(5, 4))
    messages = ours(caught)
    assert len(messages) == 1
    assert "a quantised graph ends here (" in messages[0]
    assert caught[0].filename == eager_code.__file__
    line = caught[0].lineno
    declines = [decline for decline in report.declines if decline.reason is Reason.GRAPH_BREAK]
    assert declines
    assert {decline.source for decline in declines} == {f"eager_code.py:{line}"}
    model.between = None
    assert torch.equal(compiled_by(model)(X), first), "quantised before and after it"


@both
def test_what_may_run_eagerly_after_a_graph_break_is_told(compiled_by: Compile) -> None:
    compiled = compiled_by(Model(a_break), dynamic=False)
    compiled(X)
    stance = torch.compiler.set_stance("eager_on_recompile")
    with (
        stance,
        pytest.warns(RuntimeWarning, match="under the stance eager_on_recompile, what comes after a graph break"),
    ):
        compiled(X)


@pytest.mark.parametrize(("between", "name"), [(disabled_layer, "head"), (disabled_block, r"blocks\.0\.up")])
def test_layers_that_run_eagerly_are_errors(between: Any, name: str) -> None:
    compiled = front(Model(between))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{LAYER} {name} "):
            compiled(X)


def test_what_holds_no_weights_may_run_eagerly() -> None:
    model = Model(disabled_function)
    assert torch.equal(front(model)(X), plain(model)(X))


def test_layers_in_a_function_that_is_given_up() -> None:
    """Its layers are compiled one by one (torch 2.11 leaves some out); what is not compiled is an error."""
    model = Model(in_loop=True)
    compiled = front(model, dynamic=False)
    first = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            first = compiled(X)
        except RuntimeError as error:
            assert f"{LAYER} head (Linear)" in str(error)  # noqa: PT017
    with torch.compiler.set_stance("eager_on_recompile"), pytest.raises(RuntimeError, match=f"{LAYER}|{NO_GRAPH}"):
        compiled(torch.randn(5, 4))
    if first is not None:
        assert any("could not compile a function of this model" in message for message in ours(caught))
        torch._dynamo.reset()  # Dynamo has given up the code of the class
        model.in_loop = False
        assert torch.equal(first, plain(model)(X)), "quantised all the same"


def test_torch_compile_tells_of_functions_that_are_given_up() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain(Model(in_loop=True))(X)
    assert [m for m in ours(caught) if "could not compile a function of this model" in m]


def test_hooks_cost_no_graphs_and_leave_the_model_alone() -> None:
    model = Model()
    before = model(X)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = front(model, dynamic=False)
    for rows in (2, 3, 4):
        compiled(torch.randn(rows, 4))
    assert graphs["unique_graphs"] == 3
    front(model)
    assert [len(block.up._forward_hooks) for block in model.blocks] == [1, 1], "once"
    assert torch.equal(model(X), before), "by itself it is not watched"
    assert torch.equal(copy.deepcopy(model)(X), before)
    assert list(model.state_dict()) == list(Model().state_dict())
