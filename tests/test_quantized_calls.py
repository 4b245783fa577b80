"""`quantize=` is never lost unnoticed: all the ways in which Dynamo leaves code to eager PyTorch, for both doors."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fuse_pass
from fuse_pass import FuseBackend, Reason
from fuse_pass.inductor import compat

X = torch.randn(3, 4)
SPEC = "fp8_e4m3"
NO_GRAPH = "expected this call to run a quantised graph, got none"
LAYER = "expected every layer to run in a quantised graph, but"
THE_LIMIT = "has reached Dynamo's recompile limit, and would run unquantised"
Compile = Callable[..., Any]


class RunsGraphs:
    """Instead of Inductor: the rewritten graph itself."""

    def __init__(self, *_: Any) -> None:
        self.config: dict[str, Any] = {}

    def __call__(self, gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return gm.forward  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compat, "inductor_compiler", RunsGraphs)
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=3):
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def plain(function: Any, quantize: Any = SPEC, **options: Any) -> Any:
    return torch.compile(function, backend=FuseBackend(quantize=quantize), **options)


def by_options(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="fuse_pass", options={"quantize": SPEC}, **options)


def front(function: Any, quantize: Any = SPEC, **options: Any) -> Any:
    return fuse_pass.compile(function, quantize=quantize, **options)


def in_place(function: Any, **options: Any) -> Any:
    """`module.compile()`, for modules alone."""
    function.compile(backend=FuseBackend(quantize=SPEC), **options)
    return function


both = pytest.mark.parametrize("compiled_by", [plain, front], ids=["torch.compile", "fuse_pass.compile"])
every = pytest.mark.parametrize("compiled_by", [plain, by_options, front, in_place])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.up(x)), self.scale)


class Model(nn.Module):
    """Blocks and a head, with something in between that Dynamo cannot compile or was told not to."""

    def __init__(self, between: Callable[[Model, Tensor], Tensor] | None = None, *, in_loop: bool = False) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(4, 4)
        self.between, self.in_loop = between, in_loop

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.in_loop:
                torch._dynamo.graph_break()
        if self.between is not None:
            x = self.between(self, x)
        return self.head(x)


def a_break(model: Model, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


@torch.compiler.disable
def disabled_layer(model: Model, x: Tensor) -> Tensor:
    return model.head(x)


@torch.compiler.disable
def disabled_block(model: Model, x: Tensor) -> Tensor:
    return model.blocks[0](x)


@torch.compiler.disable
def disabled_function(model: Model, x: Tensor) -> Tensor:
    return x.relu()


def ours(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "fuse_pass" in str(warning.message)]


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
        assert isinstance(caught.value.__cause__, compat.RecompileLimitHit)
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
    assert caught[0].filename == __file__
    line = caught[0].lineno
    declines = [decline for decline in report.declines if decline.reason is Reason.GRAPH_BREAK]
    assert declines
    assert {decline.source for decline in declines} == {f"test_quantized_calls.py:{line}"}
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


# --- other compilers --------------------------------------------------------------------------------------------------


def test_no_other_compiler_looks_inside() -> None:
    model = Model()
    compiled = front(model)
    expected = compiled(X) + 1
    assert not torch.equal(model(X) + 1, expected)
    assert torch.equal(torch.compile(lambda x: compiled(x) + 1, backend="eager")(X), expected)
    assert torch.equal(torch.compiler.disable(compiled)(X) + 1, expected)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = compiled

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    assert torch.equal(torch.compile(Outer(), backend="eager")(X), expected)
    with pytest.raises(RuntimeError, match=r"export would write the unquantised model; use fuse_pass\.convert"):
        torch.export.export(compiled, (X,))


def test_what_is_not_compiled_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"expected torch\.compile to compile, but it is switched off"):
        front(Model(), disable=True)
    assert fuse_pass.compile(Model(), disable=True)(X).shape == (3, 4), "unquantised, as was asked"


def test_without_quantize_nothing_is_watched() -> None:
    compiled = torch.compile(Model(), backend=FuseBackend(), dynamic=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (2, 3, 4, 5):
            compiled(torch.randn(rows, 4))
        with torch.compiler.set_stance("force_eager"):
            compiled(X)
        torch.compile(Model(a_break), backend=FuseBackend())(X)
    assert not ours(caught)


# --- exceptions, nesting, threads -------------------------------------------------------------------------------------


@both
def test_exceptions_of_the_model_pass(compiled_by: Compile) -> None:
    class MyError(Exception):
        pass

    error = MyError("mine")

    @torch.compiler.disable
    def fail() -> None:
        raise error

    def fails(x: Tensor) -> Tensor:
        x = x + 1
        fail()
        return x

    compiled, works = compiled_by(fails), compiled_by(Model())
    with pytest.raises(MyError) as caught:
        compiled(X)
    assert caught.value is error
    works(X)
    try:
        raise error
    except MyError:
        works(X)  # an exception that is handled meanwhile is none of the call
        with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match=f"{LAYER}|{NO_GRAPH}"):
            works(X)
        with pytest.raises(MyError) as caught:
            compiled(X)  # the same exception, raised once more
        assert caught.value is error


@both
def test_nested_calls_are_told_apart(compiled_by: Compile) -> None:
    model = Model()
    inner, other = compiled_by(model), compiled_by(model, quantize="fp8_e5m2")

    def calls(function: Any) -> Any:
        hidden = torch.compiler.disable(lambda x: function(x))
        return compiled_by(lambda x: hidden(x))

    assert torch.equal(calls(inner)(X), inner(X)), "graphs of the same spec are as good as its own"
    with pytest.raises(RuntimeError, match=NO_GRAPH):
        calls(other)(X)
    with pytest.raises(RuntimeError, match=f"{LAYER}|{NO_GRAPH}"):
        calls(model)(X)
    inner(X)


@both
def test_threads_are_told_apart(compiled_by: Compile) -> None:
    model = Model()
    compiled, eager = compiled_by(model), compiled_by(lambda x: disabled_layer(model, x))
    expected = compiled(X)
    with pytest.raises(RuntimeError):
        eager(X)
    wrong: list[str] = []

    def work(is_eager: bool) -> None:
        for _ in range(30):
            try:
                y = (eager if is_eager else compiled)(X)
                if is_eager or not torch.equal(y, expected):
                    wrong.append("no error, or another result")
            except RuntimeError as error:
                if not is_eager:
                    wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(is_eager,)) for is_eager in (True, False, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch._dynamo.config.fail_on_recompile_limit_hit is False
