"""Models that Dynamo cannot compile whole, and all the ways to compile them with `quantize=`, without Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fuse_pass
from fuse_pass import FuseBackend
from fuse_pass.inductor import compiler

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
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiler, "inductor_compiler", RunsGraphs)
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
