"""Every algebraically equal way of writing an activation is found under its name; anything else is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fuse_pass.graph.expression import same, same_structure
from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.patterns.activation_forms import normal_form
from fuse_pass.report import Reason
from tests.patterns.truth import assert_agrees, assert_fused_like_eager, eager, fused, leaves

LEARNED = ("star_relu",)
FORMS = {row.name: row.forms for row in ACTIVATIONS.values() if row.forms and row.name not in LEARNED}

Elementwise = Callable[[Tensor], Tensor]
ROOT = math.sqrt(2 / math.pi)

GELU: dict[str, Elementwise] = {
    "definition": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "transformers' GELU in Python": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "cumulative first": lambda x: (1 + torch.erf(x * math.sqrt(0.5))) / 2 * x,
    "distributed": lambda x: 0.5 * x + 0.5 * x * torch.erf(x / 2**0.5),
    "odd": lambda x: 0.5 * x * (1 - torch.erf(-x / math.sqrt(2))),
    "subtracted": lambda x: (x - x * torch.erf(-x * 0.7071067811865475)) * 0.5,
    "methods": lambda x: x.div(math.sqrt(2)).erf().add(1).mul(x).mul(0.5),
    "short constant": lambda x: 0.5 * x * (1 + torch.erf(x * 0.70710678)),
}
GELU_TANH: dict[str, Elementwise] = {
    "transformers' NewGELU": lambda x: (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "transformers' FastGELU": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "Megatron": lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
    "cube as products": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x * x * x))),
    "square": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * x * (1 + 0.044715 * x.square()))),
    "x squared": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * x * (0.044715 * x**2 + 1))),
    "expanded": lambda x: x / 2 + x / 2 * torch.tanh(ROOT * x + ROOT * 0.044715 * x**3),
    "odd": lambda x: 0.5 * x * (1 - torch.tanh(-ROOT * (x + 0.044715 * x.pow(3)))),
}
QUICK_GELU: dict[str, Elementwise] = {
    "transformers' QuickGELU": lambda x: x * torch.sigmoid(1.702 * x),
    "reversed": lambda x: (x * 1.702).sigmoid() * x,
    "quotient": lambda x: x / (1 + torch.exp(-1.702 * x)),
}
SILU: dict[str, Elementwise] = {
    "product": lambda x: x * torch.sigmoid(x),
    "reversed": lambda x: torch.special.expit(x) * x,
    "quotient": lambda x: x / (1 + torch.exp(-x)),
    "quotient with neg": lambda x: x / (torch.exp(x.neg()) + 1.0),
    "reciprocal": lambda x: x * torch.reciprocal(1 + torch.exp(-x)),
}
MISH: dict[str, Elementwise] = {
    "softplus": lambda x: x * torch.tanh(F.softplus(x)),
    "transformers' Mish in Python": lambda x: x * torch.tanh(torch.nn.functional.softplus(x)),
    "log1p": lambda x: torch.tanh(torch.log1p(torch.exp(x))) * x,
    "log": lambda x: x * torch.tanh(torch.log(1 + x.exp())),
}
RELU_SQUARED: dict[str, Elementwise] = {
    "power": lambda x: F.relu(x) ** 2,
    "pow": lambda x: F.relu(x).pow(2.0),
    "square": lambda x: torch.square(torch.relu(x)),
    "square method": lambda x: x.relu().square(),
    "relu in place": lambda x: F.relu(x, inplace=True).square(),
    "product": lambda x: F.relu(x) * F.relu(x),
    "product of one node": lambda x: (lambda r: r * r)(F.relu(x)),
}
HARDSWISH: dict[str, Elementwise] = {
    "MobileNetV3": lambda x: x * F.relu6(x + 3) / 6,
    "quotient first": lambda x: x * (F.relu6(x + 3.0) / 6.0),
    "factor": lambda x: F.relu6(3 + x) * x * (1 / 6),
    "hardtanh": lambda x: F.hardtanh(x + 3, 0, 6).mul(x).div(6),
    "hardsigmoid": lambda x: x * F.hardsigmoid(x),
}
HARDSIGMOID: dict[str, Elementwise] = {"relu6": lambda x: F.relu6(x + 3) / 6}
WRITTEN = {
    "gelu": GELU, "gelu_tanh": GELU_TANH, "quick_gelu": QUICK_GELU, "silu": SILU, "mish": MISH,
    "relu_squared": RELU_SQUARED, "hardswish_of_relu6": HARDSWISH, "hardsigmoid_of_relu6": HARDSIGMOID,
}  # fmt: skip

# Of a scale and a bias that are parameters.
STAR_RELU: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "timm's StarReLU": lambda x, s, b: s * F.relu(x) ** 2 + b,
    "in place": lambda x, s, b: s * F.relu(x, inplace=True) ** 2 + b,
    "bias first": lambda x, s, b: b + s * F.relu(x).square(),
    "product": lambda x, s, b: (lambda r: r * s * r + b)(F.relu(x)),
    "addcmul of methods": lambda x, s, b: x.relu().pow(2).mul(s).add(b),
    "no bias": lambda x, s, b: F.relu(x) ** 2 * s,
}
# One token away.
NOT_STAR_RELU: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "scale squared": lambda x, s, b: s * s * F.relu(x) ** 2 + b,
    "scale inside": lambda x, s, b: F.relu(s * x) ** 2 + b,
    "bias times scale": lambda x, s, b: s * (F.relu(x) ** 2 + b),
    "bias alone": lambda x, s, b: F.relu(x) ** 2 + b,
    "cubed": lambda x, s, b: s * F.relu(x) ** 3 + b,
    "minus the bias": lambda x, s, b: s * F.relu(x) ** 2 - b,
    "a bias in two": lambda x, s, b: s * F.relu(x) ** 2 + b + b,
    "scale as bias": lambda x, s, b: s * F.relu(x) ** 2 + s,
}

# Different functions, some of which are one token away from a form.
OTHERS: dict[str, Elementwise] = {
    "cubed ReLU": lambda x: F.relu(x) ** 3,
    "ReLU times x": lambda x: F.relu(x) * x,
    "ReLU of minus x": lambda x: F.relu(x) * F.relu(-x),
    "hardswish by clamp, which has other gradients at its kinks": lambda x: x * torch.clamp(x + 3, 0, 6) / 6,
    "transformers' Laplace": lambda x: 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0)))),
    "Laplace times x": lambda x: x * 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0)))),
    "the cumulative alone": lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "erf without the one": lambda x: 0.5 * x * torch.erf(x / math.sqrt(2)),
    "tanh for erf": lambda x: 0.5 * x * (1 + torch.tanh(x / math.sqrt(2))),
    "square for cube": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**2))),
    "sigmoid squared": lambda x: x * torch.sigmoid(x) * torch.sigmoid(x),
    "x squared times sigmoid": lambda x: x * x * torch.sigmoid(x),
    "sigmoid alone": lambda x: torch.sigmoid(x) * 1.0,
    "sigmoid of minus x": lambda x: x * torch.sigmoid(x.abs()),
    "tanh": lambda x: torch.tanh(x) * 1.0,
    "tanhshrink": lambda x: (x - torch.tanh(x)) * 1.0,
    "mish without exp": lambda x: x * torch.tanh(torch.log1p(x * x)),
    "rounded quotient": lambda x: torch.div(x, 1 + torch.exp(-x), rounding_mode="floor"),
    "two activations": lambda x: F.gelu(x) * F.silu(x),
}
# The same structure, another constant.
NEAR: dict[str, Elementwise] = {
    "minus for plus": lambda x: 0.5 * x * (1 - torch.erf(x / math.sqrt(2))),
    "gelu scaled": lambda x: 0.25 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu of sqrt 3": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(3))),
    "gelu with three digits": lambda x: 0.5 * x * (1 + torch.erf(x * 0.707)),
    "tanh constant": lambda x: 0.5 * x * (1 + torch.tanh(0.79788 * (x + 0.044715 * x**3))),
    "cubic constant": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.0447 * x**3))),
    "quick constant": lambda x: x * torch.sigmoid(1.7 * x),
    "minus x": lambda x: x * torch.sigmoid(-x),
    "silu scaled": lambda x: 2 * x * torch.sigmoid(x),
    "mish beta": lambda x: x * torch.tanh(F.softplus(x, beta=2)),
    "mish threshold": lambda x: x * torch.tanh(F.softplus(x, threshold=1)),
    "squared ReLU doubled": lambda x: 2 * F.relu(x) ** 2,
    "hardswish of seven": lambda x: x * F.relu6(x + 3) / 7,
    "hardswish clipped at five": lambda x: x * F.hardtanh(x + 3, 0, 5) / 6,
    "hardswish shifted": lambda x: x * F.relu6(x + 2) / 6,
    "swish of one half": lambda x: x / (1 + torch.exp(-0.5 * x)),
}


def between_linears(activation: Elementwise) -> Callable[..., Tensor]:
    return lambda x, w1, b1, w2: F.linear(activation(F.linear(x, w1, b1)), w2)


def inputs() -> dict[str, Any]:
    shapes = {"x": (5, 8), "w1": (24, 8), "b1": (24,), "w2": (16, 24)}
    return {name: (torch.randn(*shape) * 1.5).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "activation"),
    [pytest.param(name, f, id=f"{name}: {how}") for name, ways in WRITTEN.items() for how, f in ways.items()],
)
def test_written_out_forms_fuse_under_their_name(name: str, activation: Elementwise) -> None:
    """As exact as eager's activation of that name: its sigmoid and its exp, say, come from different libraries."""
    written, tensors = between_linears(activation), inputs()
    found, ours = fused(written, leaves(tensors))
    assert found.report.counts() == {"dense_act_dense": 1}
    assert name in found.calls("dense_act_dense")[0].args
    named = between_linears(lambda x: ACTIVATIONS[name].forward(x, (), None))
    assert_agrees(ours, eager(named, leaves(tensors)), eager(written, leaves(tensors, torch.float64)))


@pytest.mark.parametrize("activation", OTHERS.values(), ids=OTHERS)
def test_other_functions_do_not_fuse(activation: Elementwise) -> None:
    found, _ = fused(between_linears(activation), list(inputs().values()))
    assert found.report.counts() == {}
    assert found.rewritten[0] is found.originals[0]
    assert Reason.CONSTANTS not in {decline.reason for decline in found.report.declines}


@pytest.mark.parametrize("activation", NEAR.values(), ids=NEAR)
def test_near_misses_are_declined_for_their_constant(activation: Elementwise) -> None:
    found = assert_fused_like_eager(between_linears(activation), inputs(), counts={})
    (decline,) = found.report.declines
    assert decline.reason is Reason.CONSTANTS
    assert " where " in decline.detail


def test_float64_wants_all_digits() -> None:
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs().items()}
    assert_fused_like_eager(between_linears(GELU["definition"]), wide, counts={"dense_act_dense": 1})
    found = assert_fused_like_eager(between_linears(GELU["short constant"]), wide, counts={})
    assert found.report.declines[0].reason is Reason.CONSTANTS


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_what_the_op_computes(name: str) -> None:
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    for form in FORMS[name]:
        torch.testing.assert_close(form(x), ACTIVATIONS[name].forward(x, (), None), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_different_names_differ(name: str) -> None:
    for form in FORMS[name]:
        for other, forms in FORMS.items():
            if other != name:
                assert not any(same(normal_form(form), normal_form(f), 1e-3) for f in forms)


def with_learned(function: Callable[..., Tensor], shape: tuple[int, ...] = (1,)) -> tuple[Any, dict[str, Any]]:
    tensors = inputs() | {"s": torch.full(shape, 0.9).requires_grad_(), "b": torch.full(shape, -0.4).requires_grad_()}
    return lambda x, w1, b1, w2, s, b: F.linear(function(F.linear(x, w1, b1), s, b), w2), tensors


@pytest.mark.parametrize("shape", [(1,), ()], ids=["one element", "no dimension"])
@pytest.mark.parametrize("function", STAR_RELU.values(), ids=STAR_RELU)
def test_learned_numbers_are_found_in_any_order(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    block, tensors = with_learned(function, shape)
    found = assert_fused_like_eager(block, tensors, counts={"dense_act_dense": 1})
    assert "star_relu" in found.calls("dense_act_dense")[0].args
    for name in ("x", "b1"):
        tensors[name].requires_grad_(False)
    assert_fused_like_eager(block, tensors, counts={"dense_act_dense": 1})


@pytest.mark.parametrize("function", NOT_STAR_RELU.values(), ids=NOT_STAR_RELU)
def test_functions_of_learned_numbers_that_are_none_of_ours(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    assert_fused_like_eager(*with_learned(function), counts={})


def test_a_learned_scale_per_channel_is_no_number() -> None:
    block, tensors = with_learned(STAR_RELU["timm's StarReLU"])
    assert_fused_like_eager(block, tensors | {"s": torch.randn(24, requires_grad=True)}, counts={})


def test_learned_numbers_in_a_wider_dtype_make_the_rest_wider() -> None:
    block, tensors = with_learned(STAR_RELU["timm's StarReLU"])

    def in_bfloat16(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, s: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = block(x, w1, b1, w2, s, b)
        return y

    found = assert_fused_like_eager(in_bfloat16, tensors, counts={})
    assert [decline.reason for decline in found.report.declines] == [Reason.DTYPES]


def test_learned_numbers_that_depend_on_the_activation_are_left_alone() -> None:
    """Then what is between the layers has a second reader."""
    block, tensors = with_learned(lambda x, s, b: x.mean().view(1) * F.relu(x) ** 2 + b)
    found = assert_fused_like_eager(block, tensors, counts={})
    assert Reason.SECOND_READER in {decline.reason for decline in found.report.declines}


def scaled(x: Tensor, factors: list[float], form: Elementwise) -> Tensor:
    """`form(x)` multiplied and divided again by each factor."""
    y = form(x)
    for factor in factors:
        y = y * factor
    for factor in factors:
        y = y / factor
    return y


@given(st.lists(st.sampled_from([2.0, 0.5, 4.0, 0.25, -1.0, 8.0]), max_size=4), st.sampled_from(sorted(FORMS)))
@settings(deadline=None, max_examples=60)
def test_factors_that_cancel_do_not_matter(factors: list[float], name: str) -> None:
    form = FORMS[name][0]
    assert same(normal_form(lambda x: scaled(x, factors, form)), normal_form(form), 1e-12)


@given(st.floats(0.1, 10).filter(lambda c: abs(c - 1) > 1e-4), st.sampled_from(sorted(FORMS)))
@settings(deadline=None, max_examples=60)
def test_a_factor_that_stays_does_matter(factor: float, name: str) -> None:
    form = FORMS[name][0]
    with_factor = normal_form(lambda x: factor * form(x))
    assert same_structure(with_factor, normal_form(form))
    assert not same(with_factor, normal_form(form), 1e-6)
    assert not same(normal_form(lambda x: form(factor * x)), normal_form(form), 1e-6)
