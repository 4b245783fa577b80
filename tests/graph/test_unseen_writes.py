"""Which writes a group of nodes cannot see, because they share no memory with it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fuse_pass.graph.unseen_writes import is_seen_by_none_of
from fuse_pass.graph.view import GraphView
from tests.graph.dynamo import view_of

X = torch.randn(3, 5)


def node(view: GraphView, target: Any) -> Node:
    return next(n for n in view.nodes if n.target == target)


def timm(x: Tensor) -> Tensor:
    mask = x.new_empty((3, 1)).bernoulli_(0.9)
    mask.div_(0.9)
    return torch.cos(torch.sin(x)) + x * mask


def transformers(x: Tensor) -> Tensor:
    mask = 0.9 + torch.rand((3, 1))
    mask.floor_()
    return torch.cos(torch.sin(x)) + x.div(0.9) * mask


@pytest.mark.parametrize(
    ("function", "writes"), [(timm, ("bernoulli_", "div_")), (transformers, ("floor_",))], ids=["timm", "transformers"]
)
def test_masks_of_drop_path(function: Callable[..., Any], writes: tuple[str, ...]) -> None:
    view = view_of(function, X)
    group = {node(view, torch.sin), node(view, torch.cos)}
    for write in writes:
        assert is_seen_by_none_of(view, node(view, write), group)


def test_a_reader_of_the_mask_sees_it() -> None:
    view = view_of(timm, X)
    assert not is_seen_by_none_of(view, node(view, "div_"), {node(view, operator.mul)})


def returned(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    y.add_(1)
    return torch.cos(torch.sin(x)), y


def running_average(x: Tensor) -> Tensor:
    average = torch.zeros(5)
    with torch.no_grad():
        average.copy_(average.lerp(x.mean(0), 0.1))
    return torch.cos(torch.sin(x)) * average


def spectral_norm(x: Tensor) -> Tensor:
    u = torch.zeros(5)
    F.normalize(x[0], dim=0, out=u)
    return torch.cos(torch.sin(x)) * u


def batch_statistics(x: Tensor) -> Tensor:
    mean, variance = torch.zeros(5), torch.ones(5)
    return torch.cos(torch.sin(x)) * F.batch_norm(x, mean, variance, training=True)


@pytest.mark.parametrize(
    ("function", "write"),
    [
        (returned, "add_"),
        (running_average, "copy_"),
        (spectral_norm, F.normalize),
        (batch_statistics, F.batch_norm),
    ],
)
def test_other_tensors(function: Callable[..., Any], write: Any) -> None:
    view = view_of(function, X)
    assert is_seen_by_none_of(view, node(view, write), {node(view, torch.sin), node(view, torch.cos)})


def test_arguments_of_one_storage_share_memory() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        y.mul_(2)
        return torch.cos(torch.sin(x))

    both = torch.randn(8)
    view = view_of(function, both[:5], both[3:])
    assert not is_seen_by_none_of(view, node(view, "mul_"), {node(view, torch.sin), node(view, torch.cos)})


def test_statistics_given_by_name_are_not_told_apart() -> None:
    def function(x: Tensor) -> Tensor:
        mean, variance = torch.zeros(5), torch.ones(5)
        y = F.batch_norm(x, mean, running_var=variance, training=True)
        return torch.cos(torch.sin(variance)) * y

    view = view_of(function, X)
    assert not is_seen_by_none_of(view, node(view, F.batch_norm), {node(view, torch.sin), node(view, torch.cos)})


def of_the_argument(x: Tensor) -> Tensor:
    x.mul_(2)
    return torch.cos(torch.sin(x))


def of_a_view(x: Tensor) -> Tensor:
    y = x.view(5, 3)
    y.mul_(2)
    return torch.cos(torch.sin(x))


def read_by_the_group(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)
    return torch.cos(torch.sin(y))


def read_by_way_of_a_view(x: Tensor) -> Tensor:
    y = x * 2
    z = y.view(5, 3)
    y.add_(1)
    return torch.cos(torch.sin(z))


def written_by_an_operator(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)
    y += 1
    return torch.cos(torch.sin(y))


@pytest.mark.parametrize(
    "function",
    [of_the_argument, of_a_view, read_by_the_group, read_by_way_of_a_view, written_by_an_operator],
)
def test_other_writes_may_be_seen(function: Callable[..., Any]) -> None:
    view = view_of(function, X.clone())
    write = node(view, "mul_" if "add_" not in {n.target for n in view.nodes} else "add_")
    assert not is_seen_by_none_of(view, write, {node(view, torch.sin), node(view, torch.cos)})
