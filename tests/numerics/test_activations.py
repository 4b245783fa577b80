"""Every activation against autograd through `torch.nn.functional`, in value and in gradient."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.numerics.activations import ACTIVATIONS
from tests.precision import assert_as_exact_as_eager

ARGUMENTS: dict[str, tuple[float, ...]] = {
    "leaky_relu": (0.2,), "elu": (0.7,), "hardtanh": (-3.0, 2.5), "softplus": (2.0, 15.0),
}  # fmt: skip
EXACT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda h, w: F.gelu(h),
    "gelu_tanh": lambda h, w: F.gelu(h, approximate="tanh"),
    "quick_gelu": lambda h, w: h * torch.sigmoid(1.702 * h),
    "relu": lambda h, w: F.relu(h),
    "leaky_relu": lambda h, w: F.leaky_relu(h, 0.2),
    "prelu": lambda h, w: F.prelu(h, w),
    "elu": lambda h, w: F.elu(h, 0.7),
    "selu": lambda h, w: F.selu(h),
    "silu": lambda h, w: F.silu(h),
    "mish": lambda h, w: F.mish(h),
    "relu_squared": lambda h, w: F.relu(h) ** 2,
    "star_relu": lambda h, w: w[0] * F.relu(h) ** 2 + w[1],
    "hardswish": lambda h, w: F.hardswish(h),
    "hardsigmoid": lambda h, w: F.hardsigmoid(h),
    "hardswish_of_relu6": lambda h, w: h * F.relu6(h + 3) / 6,
    "hardsigmoid_of_relu6": lambda h, w: F.relu6(h + 3) / 6,
    "hardtanh": lambda h, w: F.hardtanh(h, -3.0, 2.5),
    "sigmoid": lambda h, w: torch.sigmoid(h),
    "tanh": lambda h, w: torch.tanh(h),
    "softplus": lambda h, w: F.softplus(h, 2.0, 15.0),
}
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def values(dtype: torch.dtype = torch.float64) -> Tensor:
    """Where activations bend and where they are flat."""
    ends = torch.tensor([0.0, -0.0, 1e-4, -1e-4, 3.0, -3.0, 12.0, -12.0, 40.0, -40.0], dtype=torch.float64)
    return torch.cat([ends, torch.linspace(-8, 8, 401, dtype=torch.float64)]).to(dtype).view(3, -1)


LEARNED = {"prelu": (0.3,), "star_relu": (0.9, -0.4)}


def learned(name: str, dtype: torch.dtype) -> Tensor | None:
    return torch.tensor(LEARNED[name], dtype=dtype) if name in LEARNED else None


def by_autograd(name: str, h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    h = h.detach().clone().requires_grad_()
    out = EXACT[name](h, torch.tensor(LEARNED.get(name, ()), dtype=h.dtype))
    (grad_h,) = torch.autograd.grad(out, h, grad)
    return out.detach(), grad_h


def ours(name: str, h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    row, weight = ACTIVATIONS[name], learned(name, h.dtype)
    arguments = ARGUMENTS.get(name, ())
    return row.forward(h, arguments, weight), row.backward(grad, h, arguments, weight)


def test_every_activation_is_tested() -> None:
    assert set(EXACT) == set(ACTIVATIONS)
    assert all(row.name == name for name, row in ACTIVATIONS.items())


@pytest.mark.parametrize("name", EXACT)
def test_float64_is_the_same_function(name: str) -> None:
    h = values()
    grad = torch.randn_like(h)
    value, grad_h = ours(name, h, grad)
    exact, exact_grad = by_autograd(name, h, grad)
    torch.testing.assert_close(value, exact, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(grad_h, exact_grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("name", EXACT)
def test_as_exact_as_eager(name: str, dtype: torch.dtype) -> None:
    h = values(dtype)
    grad = torch.randn_like(h)
    value, grad_h = ours(name, h, grad)
    eager, eager_grad = by_autograd(name, h, grad)
    exact, exact_grad = by_autograd(name, h.double(), grad.double())
    assert_as_exact_as_eager(value, eager, exact)
    assert_as_exact_as_eager(grad_h, eager_grad, exact_grad, "gradient")


@pytest.mark.parametrize("name", EXACT)
def test_gradient_is_the_derivative_of_the_value(name: str) -> None:
    """Central differences, which share no formula with autograd; away from the kinks."""
    h = values().flatten()
    for kink in (0.0, 3.0, -3.0, 2.5, 7.5):  # the last is where this softplus becomes linear
        h = h[(h - kink).abs() > 1e-3]
    step = 1e-6
    row, weight, arguments = ACTIVATIONS[name], learned(name, torch.float64), ARGUMENTS.get(name, ())
    difference = (row.forward(h + step, arguments, weight) - row.forward(h - step, arguments, weight)) / (2 * step)
    torch.testing.assert_close(row.backward(torch.ones_like(h), h, arguments, weight), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_special_values_behave_as_in_eager(name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    h = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e30, -1e30, largest, -largest], dtype=dtype)
    value, grad_h = ours(name, h, torch.ones_like(h))
    eager, eager_grad = by_autograd(name, h, torch.ones_like(h))
    # Eager rounds every step of what is written out.
    exact = 2 * torch.finfo(dtype).eps if name.endswith("_of_relu6") else 0
    torch.testing.assert_close(value, eager, rtol=exact, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(value[:2]), torch.signbit(eager[:2]))
    finite = torch.isfinite(h)
    # Eager's own gradient of tanh-GELU is NaN from 1e30 on; ours is the same function.
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(grad_h[finite], eager_grad[finite], **tolerance)
    torch.testing.assert_close(grad_h[2], eager_grad[2], equal_nan=True)  # where h is NaN


@pytest.mark.parametrize("name", EXACT)
def test_infinite_inputs_have_the_limit_where_eager_has_it(name: str) -> None:
    h = torch.tensor([math.inf, -math.inf])
    _, grad_h = ours(name, h, torch.ones(2))
    _, eager_grad = by_autograd(name, h, torch.ones(2))
    defined = ~eager_grad.isnan()
    assert torch.equal(grad_h[defined], eager_grad[defined])


@pytest.mark.parametrize("dtype", [torch.float64, *HALF_AND_SINGLE])
@pytest.mark.parametrize("name", LEARNED)
def test_gradients_of_what_is_learned(name: str, dtype: torch.dtype) -> None:
    h = values(dtype)
    grad, row = torch.randn_like(h), ACTIVATIONS[name]
    weight = torch.tensor(LEARNED[name], dtype=dtype)
    assert row.weight_backward is not None
    ours = row.weight_backward(grad, h, weight)
    exact_weight = weight.double().requires_grad_()
    (exact,) = torch.autograd.grad(EXACT[name](h.double(), exact_weight), exact_weight, grad.double())
    assert ours.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_must_be_given(name: str) -> None:
    with pytest.raises(ValueError, match="learned numbers"):
        ACTIVATIONS[name].forward(torch.randn(3), (), None)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_prelu_has_a_slope_per_channel_of_the_last_dimension(dtype: torch.dtype) -> None:
    h, grad = torch.randn(5, 7).to(dtype).requires_grad_(), torch.randn(5, 7).to(dtype)
    weight = torch.linspace(-0.5, 0.5, 7).to(dtype)
    row, eager = ACTIVATIONS["prelu"], F.prelu(h, weight)
    assert torch.equal(row.forward(h, (), weight), eager)
    assert torch.equal(row.backward(grad, h.detach(), (), weight), torch.autograd.grad(eager, h, grad)[0])


@pytest.mark.parametrize("name", EXACT)
def test_dtype_and_shape_are_kept(name: str) -> None:
    for dtype in (*HALF_AND_SINGLE, torch.float64):
        for h in (torch.randn(4, 0).to(dtype), torch.randn(6, 4).to(dtype).t(), torch.randn(2, 3, 4).to(dtype)):
            value, grad_h = ours(name, h, torch.ones_like(h))
            assert (value.dtype, value.shape) == (grad_h.dtype, grad_h.shape) == (dtype, h.shape)


@pytest.mark.parametrize("name", [name for name, row in ACTIVATIONS.items() if row.post_op is not None])
def test_post_op_is_the_same_activation(name: str) -> None:
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is None or not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch lacks oneDNN")
    post_op = ACTIVATIONS[name].post_op
    assert post_op is not None
    # A product with the identity: what is left is the activation.
    h, arguments = values(torch.float32).view(-1, 1), list(ARGUMENTS.get(name, ()))
    value = linear(h, torch.eye(1), None, post_op[0], arguments, post_op[1])
    eager, _ = by_autograd(name, h, torch.ones_like(h))
    exact, _ = by_autograd(name, h.double(), torch.ones_like(h).double())
    assert_as_exact_as_eager(value, eager, exact)
    assert linear(torch.tensor([[math.nan]]), torch.eye(1), None, post_op[0], arguments, post_op[1]).isnan()


def test_rows_take_all_their_arguments() -> None:
    for row in ACTIVATIONS.values():
        assert len(inspect.signature(row.forward).parameters) == 3
        assert len(inspect.signature(row.backward).parameters) == 4
