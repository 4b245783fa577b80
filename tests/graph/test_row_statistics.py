"""Arithmetic with row statistics has one normal form, however it is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fuse_pass.graph.expression import NotElementwise, Polynomial, add, constant, multiply, power, same
from fuse_pass.graph.row_statistics import RowReader, X, atom, mean, reciprocal, root, variance
from tests.graph.dynamo import result_of, view_of

Z, W = torch.randn(3, 5, 4), torch.randn(4)
M = mean(X)


def form_of(function: Callable[..., Tensor], *parameters: Tensor) -> Polynomial:
    """The normal form of `function(z, …)` over the last dimension."""
    view = view_of(function, Z, *parameters)
    x = next(node for node in view.nodes if node.name == "l_z_")
    return RowReader(view, x, (-1,)).read(result_of(view))


def test_a_mean_is_linear_and_leaves_what_is_fixed_alone() -> None:
    assert mean(constant(3.0)) == constant(3.0)
    assert mean(M) == M
    assert mean(add(X, M, -1.0)) == ()
    assert mean(multiply(M, X)) == power(M, 2)


def test_both_formulas_of_the_variance_are_one() -> None:
    centred = add(X, M, -1.0)
    assert same(mean(multiply(centred, centred)), variance(X), 1e-12)
    assert same(variance(centred), variance(X), 1e-12)


def test_roots_and_reciprocals_meet() -> None:
    spread = add(variance(X), constant(1.0))
    assert reciprocal(root(spread, 0.5)) == root(spread, -0.5)
    assert reciprocal(reciprocal(root(spread, 0.5))) == root(spread, 0.5)
    assert reciprocal(multiply(constant(2.0), root(spread, 0.5))) == multiply(constant(0.5), root(spread, -0.5))
    with pytest.raises(NotElementwise):
        reciprocal(())


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda z: z.mean(-1, keepdim=True), M),
        (lambda z: z.sum(-1, keepdim=True) / 4, M),
        (lambda z: torch.var_mean(z, -1, keepdim=True)[1], M),
        (lambda z: z.var(-1, keepdim=True, unbiased=False), variance(X)),
        (lambda z: 0.75 * z.var(-1, keepdim=True), variance(X)),
        (lambda z: (z - z.mean(-1, keepdim=True)).square().mean(-1, keepdim=True), variance(X)),
        (lambda z: z.std(-1, keepdim=True, correction=0), root(variance(X), 0.5)),
        (lambda z: z.mean(-1).unsqueeze(-1), M),
        (lambda z: z - z.mean(-1, keepdim=True), add(X, M, -1.0)),
    ],
)  # fmt: skip
def test_normal_forms(function: Callable[[Tensor], Tensor], expected: Polynomial) -> None:
    assert same(form_of(function), expected, 1e-12)


def test_a_tensor_along_the_row_is_a_leaf_whatever_it_is_computed_from() -> None:
    assert form_of(lambda z, w: z * (1 + w.exp()), W) == multiply(X, atom("leaf", (), 0))
    assert form_of(lambda z, w: z * w.sum(), W) == multiply(X, atom("tensor", (), 0))


@pytest.mark.parametrize(
    "function",
    [
        lambda z, w: z.mean(1, keepdim=True),
        lambda z, w: z.mean(),
        lambda z, w: z.amax(-1, keepdim=True),
        lambda z, w: z * torch.ones(3, 5, 1),
        lambda z, w: z.mean(-1, keepdim=True, dtype=torch.float64),
        lambda z, w: z.reshape(5, 3, 4),
        lambda z, w: z.mean(-1).view(5, 3, 1),
        lambda z, w: torch.div(z, 2, rounding_mode="floor"),
        lambda z, w: z**3,
        lambda z, w: (z * w).mean(-1) * w.sum() * torch.ones(5),
    ],
)
def test_what_is_no_arithmetic_with_row_statistics(function: Callable[..., Tensor]) -> None:
    with pytest.raises(NotElementwise):
        form_of(function, W)
