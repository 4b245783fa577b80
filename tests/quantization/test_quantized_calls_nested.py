"""Quantised calls within other compilers, within each other, in threads, and in the face of exceptions."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_pass
from fuse_pass import FuseBackend
from tests.eager_code import (
    LAYER,
    NO_GRAPH,
    Compile,
    Model,
    X,
    a_break,
    both,
    disabled_layer,
    front,
    ours,
    without_inductor,
)

__all__ = ["without_inductor"]  # a fixture


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
