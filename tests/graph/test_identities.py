"""Calls that return what they are given are taken out; whatever makes a tensor, or is returned, stays."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fuse_pass.graph.identities import forget_identities
from tests.graph.dynamo import graph_of

X = torch.randn(3, 5, requires_grad=True)
Call = Callable[[Tensor], Any]


def targets_left(call: Call, *, x: Tensor = X) -> list[Any]:
    """The targets between `sin` and `cos` once identities are forgotten, in a graph that computes what it did."""

    def function(x: Tensor) -> Tensor:
        return torch.cos(call(torch.sin(x)))

    module = graph_of(function, x)
    forget_identities(module.graph)
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(x)[0], function(x), rtol=0, atol=0)
    return [node.target for node in module.graph.nodes if node.op.startswith("call_")][1:-1]


IDENTITIES: dict[str, Call] = {
    "to dtype": lambda x: x.to(torch.float32),
    "to its own dtype": lambda x: x.to(x.dtype),
    "to device": lambda x: x.to("cpu"),
    "to both": lambda x: x.to("cpu", torch.float32),
    "to one like it": lambda x: x.to(x),
    "float": lambda x: x.float(),
    "type": lambda x: x.type(torch.float32),
    "contiguous": lambda x: x.contiguous(),
    "one after the other": lambda x: x.to("cpu").contiguous().float(),
}
OTHERS: dict[str, Call] = {
    "copy": lambda x: x.to(torch.float32, copy=True),
    "another dtype": lambda x: x.double(),
    "transposed": lambda x: x.t().contiguous(),
    "a view": lambda x: x.view(3, 5),
    "clone": lambda x: x.clone(),
    "another layout": lambda x: x.view(1, 3, 5, 1).expand(2, 3, 5, 2).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("call", IDENTITIES.values(), ids=IDENTITIES)
def test_identities_go(call: Call) -> None:
    assert targets_left(call) == []


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_what_makes_a_tensor_stays(call: Call) -> None:
    assert targets_left(call)


def test_reads_that_nobody_uses() -> None:
    def read(x: Tensor) -> Tensor:
        return x if x.is_meta else x.to("cpu")

    assert targets_left(read) == []


def test_writes_reach_what_they_reached() -> None:
    def write(x: Tensor) -> Tensor:
        y = x.float()
        y.add_(1)
        return x * y

    assert targets_left(write) == ["add_", operator.mul]


def test_what_a_graph_returns_stays() -> None:
    module = graph_of(lambda x: (x.float(), torch.sin(x)), X)
    forget_identities(module.graph)
    assert [node.target for node in module.graph.nodes if node.op == "call_method"] == ["float"]
