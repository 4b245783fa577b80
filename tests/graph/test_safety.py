"""When a group of nodes may become one, asked directly; tests/patterns asks the same through the patterns."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fuse_pass.graph.safety import Problem, find_problem
from fuse_pass.graph.view import GraphView
from fuse_pass.report import Reason
from tests.graph.dynamo import view_of

X = torch.randn(3, 5)


def node(view: GraphView, target: Any) -> Node:
    return next(n for n in view.nodes if n.target is target or n.target == target)


def problem_of(function: Any, group: list[Any], outputs: list[Any], inputs: list[Any], *arguments: Any) -> Any:
    """The problem of replacing the nodes with these targets."""
    view = view_of(function, *(arguments or (X,)))
    found = find_problem(view, *([node(view, target) for target in targets] for targets in (group, outputs, inputs)))
    assert found is None or (isinstance(found, Problem) and found.node in view.nodes and found.detail)
    return None if found is None else (found.reason, found.node.target)


def shared(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sin(x)
    return torch.cos(s), torch.exp(s)


def test_a_plain_chain_is_safe() -> None:
    assert problem_of(lambda x: torch.cos(torch.sin(x)), [torch.sin, torch.cos], [torch.cos], ["L_x_"]) is None


def test_an_interior_value_with_another_reader_is_not() -> None:
    assert problem_of(shared, [torch.sin, torch.cos], [torch.cos], ["L_x_"]) == (Reason.SECOND_READER, torch.sin)


def test_it_is_as_an_extra_output() -> None:
    assert problem_of(shared, [torch.sin, torch.cos], [torch.cos, torch.sin], ["L_x_"]) is None


def test_an_input_must_be_outside_the_group() -> None:
    found = problem_of(lambda x: torch.cos(torch.sin(x)), [torch.sin, torch.cos], [torch.cos], [torch.sin])
    assert found == (Reason.SECOND_READER, torch.sin)


def test_an_input_that_comes_after_the_first_reader_of_an_output() -> None:
    def function(x: Tensor) -> Tensor:
        s = torch.sin(x)
        late = torch.exp(s)
        return torch.atan2(s, late)

    group, inputs = [torch.sin, torch.atan2], ["L_x_", torch.exp]
    assert problem_of(function, group, [torch.atan2, torch.sin], inputs) == (Reason.ORDER, torch.exp)


def test_a_write_inside_the_group_itself_is_the_pattern_s_business() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.cos(torch.sin(x).mul_(2))

    assert problem_of(function, [torch.sin, "mul_", torch.cos], [torch.cos], ["L_x_"]) is None
    assert problem_of(function, [torch.sin, torch.cos], [torch.cos], ["L_x_"]) == (Reason.SECOND_READER, torch.sin)


def test_a_write_before_or_after_the_group_does_not_matter() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        x = (x * 1).mul_(2)
        y = torch.cos(torch.sin(x))
        return y, x.add_(1)

    assert problem_of(function, [torch.sin, torch.cos], [torch.cos], ["mul_"]) is None


def test_sizes_and_tuples_are_no_tensors() -> None:
    found = problem_of(lambda x: torch.cos(torch.frexp(x)[0]), [torch.cos], [torch.cos], [torch.frexp])
    assert found == (Reason.SUBCLASS, torch.frexp)


def test_integers() -> None:
    found = problem_of(lambda x: torch.cos(x), [torch.cos], [torch.cos], ["L_x_"], torch.arange(3))
    assert found == (Reason.DTYPES, "L_x_")


def test_sparse_tensors() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.cos(torch.mm(x.to_sparse(), x.mT))

    view = view_of(lambda x: torch.cos(x), X)
    cosine = node(view, torch.cos)
    cosine.meta["example_value"] = cosine.meta["example_value"].to_sparse()
    found = find_problem(view, [cosine], [cosine], [])
    assert found is not None
    assert found.reason is Reason.SUBCLASS


def test_a_device_that_differs_inside_the_group() -> None:
    found = problem_of(lambda x: torch.cos(x.to("meta")), ["to", torch.cos], [torch.cos], ["L_x_"])
    assert found == (Reason.DEVICES, "to")


def test_a_group_that_reaches_into_a_transform() -> None:
    def function(x: Tensor) -> Tensor:
        s = torch.sin(x)
        return torch.func.vmap(lambda row: row + torch.cos(s))(x).sum()

    assert problem_of(function, [torch.sin, torch.cos], [torch.cos], ["L_x_"]) == (Reason.FUNCTORCH, torch.cos)


def test_tuples_of_tensors_may_lie_inside() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.cos(torch.chunk(x, 2, 0)[0])

    assert problem_of(function, [torch.chunk, operator.getitem, torch.cos], [torch.cos], ["L_x_"]) is None
