"""Where an operation may be put: outside regions that hold none of what it replaces; what may move before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from fuse_pass.graph.places import nodes_to_move, place_for, run_in_one_mode
from fuse_pass.graph.view import GraphView
from tests.graph.dynamo import view_of

X, W = torch.randn(3, 5), torch.randn(5)
Compute = Callable[[Tensor, Tensor], Tensor]


def node(view: GraphView, target: Any) -> Node:
    return next(n for n in view.nodes if n.target == target)


def moved(compute: Compute, between: Callable[[Tensor, Tensor], Any] = lambda w, z: None) -> Any:
    """How many nodes must move for a weight to be known before the first reader of `z`; None where none may."""

    def function(x: Tensor, w: Tensor) -> Any:
        z = torch.sin(x)
        early = torch.tan(z)
        between(w, z)
        return torch.atan2(z, compute(w, z)), early

    view = view_of(function, X, W.clone())
    last, place = node(view, torch.atan2), node(view, torch.tan)
    weight = last.args[1]
    assert isinstance(weight, Node)
    found = nodes_to_move(view, weight, place, {node(view, torch.sin), last})
    if found is not None:
        for late in found:
            place.prepend(late)
        view.graph.lint()
    return None if found is None else len(found)


LITTLE: dict[str, tuple[Compute, int]] = {
    "a parameter": (lambda w, z: w, 0),
    "zero-centred": (lambda w, z: 1 + w, 1),
    "cast and scaled": (lambda w, z: w.double().mul(2).view(1, 5).exp(), 4),
}


@pytest.mark.parametrize(("compute", "count"), LITTLE.values(), ids=LITTLE)
def test_little_arithmetic_with_a_parameter_moves(compute: Compute, count: int) -> None:
    assert moved(compute) == count


def test_it_moves_across_a_write_that_it_does_not_see() -> None:
    assert moved(lambda w, z: w + 1, lambda w, z: torch.zeros(3).add_(1)) == 1


def switch_and_back(w: Tensor, z: Tensor) -> None:
    with torch.no_grad():
        torch.cos(z)


MORE: dict[str, tuple[Any, ...]] = {
    "of the value itself": (lambda w, z: w + z,),
    "cast to the type of the value itself": (lambda w, z: w.type_as(z),),
    "other operations": (lambda w, z: w.cumsum(0),),
    "two branches": (lambda w, z: w.mul(2) + w.exp(),),
    "in place": (lambda w, z: w.mul(2).add_(1),),
    "too much": (lambda w, z: w + 1 + 2 + 3 + 4 + 5 + 6 + 7,),
    "a write that it sees": (lambda w, z: w + 1, lambda w, z: w.detach().mul_(2)),
    "under another mode": (lambda w, z: w + 1, switch_and_back),
}


@pytest.mark.parametrize("case", MORE.values(), ids=MORE)
def test_all_else_stays(case: tuple[Any, ...]) -> None:
    assert moved(*case) is None


def region(x: Tensor, w: Tensor) -> Any:
    z = torch.sin(x)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            early = torch.tan(z)
        late = torch.exp(z)
    return torch.atan2(z, w), early, late


def test_a_place_in_a_region_is_moved_before_it() -> None:
    view = view_of(region, X.clone().requires_grad_(), W)
    first, last = node(view, torch.sin), node(view, torch.atan2)
    assert run_in_one_mode(view, [first, last])
    assert place_for(view, node(view, torch.tan), last) is node(view, torch._C._set_grad_enabled)
    assert place_for(view, node(view, torch.exp), last) is node(view, torch._C._set_grad_enabled)
    assert place_for(view, last, last) is last
    assert place_for(view, node(view, torch.exp), node(view, torch.exp)) is node(view, torch.exp)


def test_modes_of_members() -> None:
    view = view_of(region, X.clone().requires_grad_(), W)
    first, inside, behind = (node(view, target) for target in (torch.sin, torch.tan, torch.exp))
    assert not run_in_one_mode(view, [first, inside])
    assert not run_in_one_mode(view, [first, behind])
    assert not run_in_one_mode(view, [inside, behind])
    assert view.modes_at(inside).autocast[0][:2] == ("cpu", torch.bfloat16)


def test_without_gradients_the_grad_mode_does_not_matter() -> None:
    view = view_of(region, X, W)
    assert run_in_one_mode(view, [node(view, torch.sin), node(view, torch.exp)])
