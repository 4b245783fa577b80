"""Rows that are constant, huge or tiny; and where results lie when x is transposed or has no elements."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass import fuse_backend
from tests.ops.gradients import wide
from tests.precision import assert_as_exact_as_eager

ops = torch.ops.fuse_pass
NORMS = ("layer_norm", "rms_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAGNITUDES = (1e-42, 1e-30, 1e-6, 1.0, 2000.0, 11898.57421875, 1e6, 1e19, 1e30, 1e36, 1e200, torch.inf)


def extreme_rows(dtype: torch.dtype, width: int) -> Tensor:
    """Of every magnitude up to the largest number: constant, one ulp apart, with one other element, random."""
    largest = torch.finfo(dtype).max
    rows = []
    for magnitude in (min(magnitude, largest) for magnitude in MAGNITUDES):
        constant = torch.full((width,), magnitude, dtype=torch.float64).to(dtype)
        noise = torch.where(torch.randn(width) > 0, torch.nextafter(constant, torch.zeros_like(constant)), constant)
        last = torch.arange(width) == width - 1
        uneven = torch.where(last, -constant, constant), torch.where(last, constant, 0.0)
        random = torch.randn(width, dtype=torch.float64).clamp(-3, 3) / 3
        rows += [constant, -constant, noise, *uneven, (random * min(magnitude, largest)).to(dtype)]
    return torch.stack(rows).requires_grad_()


def both_ways(x: Tensor, norm: str, eps: float, fused: bool) -> tuple[Tensor, Tensor]:
    """The norm and the gradient of x, for a gradient without equal elements."""
    width, weight = x.shape[-1], torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)
    if fused:
        y: Tensor = ops.dropout_norm(x, None, weight, None, None, 0.0, eps, 1, norm, None, False)[0]
    else:
        y = F.layer_norm(x, (width,), weight, None, eps) if norm == "layer_norm" else F.rms_norm(
            x, (width,), weight, eps
        )  # fmt: skip
    (grad,) = torch.autograd.grad(y, [x], torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))
    return y.detach(), grad


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("width", [2, 7, 24, 49, 480, 920, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_finite_where_eager_is(norm: str, dtype: torch.dtype, width: int, eps: float) -> None:
    x = extreme_rows(dtype, width)
    pairs = zip(both_ways(x, norm, eps, True), both_ways(x, norm, eps, False), strict=True)
    for what, (ours, eager) in zip(("y", "gradient"), pairs, strict=True):
        worse = eager.isfinite().all(-1) & ~ours.isfinite().all(-1)
        assert not worse.any(), f"{what} of rows that begin with {x[worse][:, :2]}"


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("width", [1, 7, 49, 480, 1000, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_row_of_any_magnitude_is_exactly_zero(dtype: torch.dtype, width: int, eps: float) -> None:
    """What its mean is off by, divided by the root of eps, would be noise or worse."""
    info = torch.finfo(torch.promote_types(dtype, torch.float32))
    magnitudes = [m for m in MAGNITUDES if info.tiny < m <= torch.finfo(dtype).max]
    x = torch.tensor(magnitudes, dtype=dtype)[:, None].repeat(1, width)
    y, _, statistics = ops.dropout_norm(x, None, None, None, None, 0.0, eps, 1, "layer_norm", None, False)
    assert torch.equal(y, torch.zeros_like(y))
    mean, rstd = statistics
    assert torch.equal(mean, x[:, :1].to(mean.dtype))
    assert torch.equal(rstd, torch.full_like(rstd, eps).rsqrt())


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("width", [49, 1000])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_gradients_of_constant_rows_are_as_exact_as_eager(dtype: torch.dtype, width: int, eps: float) -> None:
    for value in (0.0, 0.2, -3.0, 2000.0, 11898.57421875):
        x = torch.full((2, width), value, dtype=dtype, requires_grad=True)
        ours, eager = (both_ways(x, "layer_norm", eps, fused)[1] for fused in (True, False))
        exact = both_ways(wide({"x": x})["x"], "layer_norm", eps, False)[1]
        assert exact.abs().max() > 1, "the root of eps divides"
        assert_as_exact_as_eager(ours, eager, exact, f"gradient of rows of {value}")


def test_constant_rows_compiled() -> None:
    """As in BERT, whose eps is 1e-12. Eager PyTorch makes NaN of the last row."""
    width = 1000
    norm, exact_norm = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12).double()
    compiled = torch.compile(lambda x, r: norm(x + r), backend=fuse_backend)
    rows = torch.tensor([0.2, 2000.0, 11898.57421875, 1e6, 1e30])[:, None].repeat(1, width)

    def run(call: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        x = rows.to(dtype).requires_grad_()
        y = call(x)
        (grad,) = torch.autograd.grad(y, [x], torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y))
        return y.detach(), grad

    y, grad = run(lambda x: compiled(x, torch.zeros_like(x)))
    assert torch.equal(y, torch.zeros_like(y))
    assert grad.isfinite().all()
    assert_as_exact_as_eager(grad[:4], run(norm)[1][:4], run(exact_norm, torch.float64)[1][:4])


# --- where the results lie --------------------------------------------------------------------------------------------

SHAPES = (((40, 0), 1), ((0, 24), 1), ((3, 0, 24), 1), ((3, 5, 0), 1), ((0,), 1), ((2, 0, 3), 2), ((4, 24), 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("shape", "normalized_dims"), SHAPES, ids=lambda value: str(value))
def test_strides_are_those_of_the_fake_kernel(shape: tuple[int, ...], normalized_dims: int, transposed: bool) -> None:
    x = torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))) if transposed else torch.randn(shape)
    parameter = torch.ones(shape[len(shape) - normalized_dims :])
    for weight, bias, residual, p, norm, dtype in itertools.product(
        (None, parameter), (None, parameter), (None, torch.randn(shape)), (0.0, 0.3, 1.0), NORMS, (None, torch.float64)
    ):
        rest = torch.tensor(5), p, 1e-5, normalized_dims, norm, dtype, False
        arguments: tuple[Any, ...] = (x, residual, weight, bias, *rest)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = ops.dropout_norm(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments))
        real = ops.dropout_norm(*arguments)
        assert [t.stride() for t in real] == [t.stride() for t in fake], (arguments[1:4], rest)
        assert [t.shape for t in real] == [t.shape for t in fake]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_sum_lies_as_dropout_leaves_it(backend: str) -> None:
    """A transposed x that is dropped out stays transposed in eager PyTorch."""

    def function(x: Tensor) -> Tensor:
        seed = torch.tensor(5)
        z: Tensor = ops.dropout_norm(x, None, None, None, seed, 0.3, 1e-5, 1, "layer_norm", None, False)[1]
        return z

    x = torch.randn(24, 4).t()
    expected = F.dropout(x, 0.3).stride()
    assert expected == (1, 4)
    assert function(x).stride() == torch.compile(function, backend=backend)(x).stride() == expected
