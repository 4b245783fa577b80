"""Equal functions have one normal form, different functions have different ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuse_pass.graph.expression import MAX_NODES, expression_of, first_difference, same, same_structure
from fuse_pass.patterns.activation_forms import normal_form
from tests.graph.dynamo import result_of, view_of

Elementwise = Callable[[Tensor], Tensor]

EQUAL: dict[str, tuple[Elementwise, Elementwise]] = {
    "commutative product": (lambda x: x * torch.tanh(x), lambda x: torch.tanh(x) * x),
    "commutative sum": (lambda x: x + torch.exp(x), lambda x: torch.exp(x) + x),
    "associative product": (lambda x: (x * 3) * (x * 5), lambda x: x * (15 * x)),
    "associative sum": (lambda x: (x + 1) + (2 + x), lambda x: 2 * x + 3),
    "distributive": (lambda x: x * (1 + torch.erf(x)), lambda x: x + x * torch.erf(x)),
    "square of a sum": (lambda x: (x + 1) ** 2, lambda x: x * x + 2 * x + 1),
    "powers": (lambda x: x**3, lambda x: x * x.square()),
    "like terms": (lambda x: x + x, lambda x: 2 * x),
    "terms that cancel": (lambda x: x * 2 + torch.exp(x) - torch.exp(x), lambda x: 2 * x),
    "scaled addition": (lambda x: torch.add(x, torch.exp(x), alpha=2), lambda x: x + 2 * torch.exp(x)),
    "scaled subtraction": (lambda x: torch.sub(x, torch.exp(x), alpha=2), lambda x: x - 2 * torch.exp(x)),
    "minus": (lambda x: -(x - 1), lambda x: 1 - x),
    "division by a number": (lambda x: x / 4, lambda x: 0.25 * x),
    "division by a function": (lambda x: x / torch.exp(x), lambda x: x * torch.exp(x).reciprocal()),
    "odd functions": (lambda x: torch.tanh(-x), lambda x: -torch.tanh(x)),
    "odd of a sum": (lambda x: torch.erf(-x - x**3), lambda x: -torch.erf(x + x**3)),
    "folded constants": (lambda x: x * (0.5 * 4), lambda x: x + x),
    "inside a function": (lambda x: torch.exp(x * (1 + x)), lambda x: torch.exp(x * x + x)),
}
DIFFERENT: dict[str, tuple[Elementwise, Elementwise]] = {
    "even function": (lambda x: torch.exp(-x), lambda x: -torch.exp(x)),
    "functions": (lambda x: torch.exp(x), lambda x: torch.tanh(x)),
    "powers": (lambda x: x * x, lambda x: x**3),
    "square of a function": (lambda x: torch.tanh(x) * torch.tanh(x), lambda x: torch.tanh(x * x)),
    "order of functions": (lambda x: torch.tanh(torch.exp(x)), lambda x: torch.exp(torch.tanh(x))),
    "sum and product": (lambda x: x + torch.exp(x), lambda x: x * torch.exp(x)),
    "parameters": (lambda x: F.softplus(x, 2), lambda x: F.softplus(x, 3)),
    "log and log1p": (lambda x: torch.log(x), lambda x: torch.log1p(x)),
    "gelus": (lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh")),
    "missing term": (lambda x: x * (1 + torch.erf(x)), lambda x: x * torch.erf(x)),
    "constants": (lambda x: x * 0.5, lambda x: x * 0.51),
}


@pytest.mark.parametrize(("a", "b"), EQUAL.values(), ids=EQUAL)
def test_equal_functions_have_one_normal_form(a: Elementwise, b: Elementwise) -> None:
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    torch.testing.assert_close(a(x), b(x), rtol=1e-12, atol=1e-12)
    assert same(normal_form(a), normal_form(b), 1e-12)
    assert first_difference(normal_form(a), normal_form(b), 1e-12) is None


@pytest.mark.parametrize(("a", "b"), DIFFERENT.values(), ids=DIFFERENT)
def test_different_functions_have_different_ones(a: Elementwise, b: Elementwise) -> None:
    assert not same(normal_form(a), normal_form(b), 1e-4)


def polynomials(depth: int = 3) -> st.SearchStrategy[Elementwise]:
    """Random elementwise functions with exact constants."""
    numbers = st.sampled_from([-2.0, -1.0, 0.5, 2.0, 3.0])
    leaf: st.SearchStrategy[Elementwise] = st.one_of(st.just(lambda x: x), numbers.map(lambda c: lambda x: x * 0 + c))

    def extend(inner: st.SearchStrategy[Elementwise]) -> st.SearchStrategy[Elementwise]:
        return st.one_of(
            st.tuples(inner, inner).map(lambda fg: lambda x: fg[0](x) + fg[1](x)),
            st.tuples(inner, inner).map(lambda fg: lambda x: fg[0](x) * fg[1](x)),
            inner.map(lambda f: lambda x: torch.tanh(f(x))),
            inner.map(lambda f: lambda x: -f(x)),
        )

    return st.recursive(leaf, extend, max_leaves=depth)


@given(polynomials(), polynomials())
@settings(deadline=None, max_examples=80)
def test_normal_forms_decide_equality(f: Elementwise, g: Elementwise) -> None:
    """Two random functions have one normal form if and only if they agree at every point tried."""
    x = torch.linspace(-1.7, 1.9, 23, dtype=torch.float64)
    try:
        a, b = normal_form(f), normal_form(g)
    except ValueError:
        return  # larger than any activation: refused, which `test_too_large_is_nothing` asks about
    assert same(a, b, 1e-9) == torch.allclose(f(x), g(x), rtol=1e-9, atol=1e-9)


def test_first_difference_names_the_pair() -> None:
    a, b = normal_form(lambda x: x * torch.tanh(0.5 * x)), normal_form(lambda x: x * torch.tanh(0.75 * x))
    assert same_structure(a, b)
    assert first_difference(a, b, 1e-6) == (0.5, 0.75)
    assert same(a, b, 0.5)


def test_two_variables_are_nothing() -> None:
    view = view_of(lambda x, y: x * torch.tanh(y), torch.randn(3), torch.randn(3))
    assert expression_of(view, result_of(view)) is None


def test_the_variable_and_the_nodes_are_reported() -> None:
    view = view_of(lambda x: torch.sin(x) * torch.tanh(torch.sin(x) * 1), torch.randn(3))
    assert expression_of(view, result_of(view)) is None  # two different nodes, even if they have equal values
    view = view_of(lambda x: (lambda s: s * torch.tanh(s))(torch.sin(x)), torch.randn(3))
    expression = expression_of(view, result_of(view))
    assert expression is not None
    assert expression.variable.target is torch.sin
    assert {node.target for node in expression.nodes} == {torch.tanh, result_of(view).target}


def test_too_large_is_nothing() -> None:
    def long(x: Tensor) -> Tensor:
        for _ in range(count):
            x = x * 2
        return x

    for count in (MAX_NODES, MAX_NODES + 1, 1500):
        view = view_of(long, torch.randn(3))
        assert (expression_of(view, result_of(view)) is None) == (count > MAX_NODES)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 2**x,
        lambda x: x**0.5,
        lambda x: x**7,
        lambda x: torch.div(x, 2.0, rounding_mode="floor"),
        lambda x: (x * 2).add_(x.sum()),
        lambda x: x.clone() * math.inf / (x * 0 * 1 - 0 * x),
    ],
)
def test_what_has_no_normal_form_is_nothing(function: Elementwise) -> None:
    view = view_of(function, torch.randn(3))
    assert expression_of(view, result_of(view)) is None


def test_in_place_on_a_shared_value_is_nothing() -> None:
    view = view_of(lambda x: (lambda y: y.mul_(2) + y)(x * 3), torch.randn(3))
    assert expression_of(view, result_of(view)) is None
    view = view_of(lambda x: (x * 3).mul_(2), torch.randn(3))
    assert expression_of(view, result_of(view)) is not None
