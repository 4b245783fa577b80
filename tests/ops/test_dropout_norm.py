"""Dropout → [add residual] → LayerNorm or RMSNorm: values, gradients, and what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuse_pass.numerics import random_bits
from fuse_pass.patterns.spellings.dropout_norm import CORPUS
from tests.ops.gradients import DTYPES, ROWS, assert_gradients_exact, run, wide
from tests.precision import assert_as_exact_as_eager

example_inputs, reference = CORPUS.example_inputs, CORPUS.reference

ops = torch.ops.fuse_pass
SEED, P, EPS = 0x1234_5678_9ABC_DEF0, 0.3, 1e-5
NAMES = ("x", "residual", "weight", "bias")
NORMS = ("layer_norm", "rms_norm")


def inputs(norm: str = "layer_norm", dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    values = example_inputs(dtype, **options)
    return values | {"bias": None} if norm == "rms_norm" else values


def settings(norm: str = "layer_norm", p: float = P, norm_dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    return torch.tensor(SEED) if p else None, p, EPS, 1, norm, norm_dtype, False


def both(values: dict[str, Any], norm: str = "layer_norm", p: float = P) -> tuple[Tensor, Tensor]:
    y, z, *_ = ops.dropout_norm(*(values[name] for name in NAMES), *settings(norm, p))
    return y, z


def ours(values: dict[str, Any], norm: str = "layer_norm", p: float = P) -> Tensor:
    return both(values, norm, p)[0]


def keep_of(x: Tensor, p: float) -> Tensor | None:
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    return random_bits.keep_mask(torch.tensor(SEED), rows, columns, p).view(x.shape) if p else None


def by_reference(values: dict[str, Any], norm: str = "layer_norm", p: float = P) -> Tensor:
    return reference(*(values[name] for name in NAMES), norm=norm, eps=EPS, keep=keep_of(values["x"], p), p=p)


def assert_exact(values: dict[str, Any], *arguments: Any) -> None:
    assert_gradients_exact(ours, by_reference, values, *arguments)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, P, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", ROWS)
@pytest.mark.parametrize("norm", NORMS)
def test_as_exact_as_eager(norm: str, rank: str, dtype: torch.dtype, p: float) -> None:
    assert_exact(inputs(norm, dtype, rows=ROWS[rank]), norm, p)


@pytest.mark.parametrize("rows", [(32,), (4, 25), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_parameters_whose_gradients_are_summed_in_blocks(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Whole blocks of rows, and some that are left over."""
    assert_exact(inputs("layer_norm", dtype, rows=rows))


def test_no_features_in_blocks_of_rows() -> None:
    x, weight, bias = torch.randn(40, 0), torch.ones(0), torch.zeros(0)
    values = {"x": x, "residual": x.clone(), "weight": weight, "bias": bias}
    grads = run(ours, {name: value.requires_grad_() for name, value in values.items()}, "layer_norm", 0.0)
    assert grads["x"].shape == (40, 0)
    assert grads["weight"].shape == grads["bias"].shape == (0,)


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_a_constant_row_is_exactly_zero(eps: float) -> None:
    """The rounding of its mean, divided by the root of eps, would be noise of 1e-5 and more."""
    x = torch.full((4, 23), 0.2) + torch.tensor([[0.0], [1.0], [100.0], [-3e4]])
    y = ops.dropout_norm(x, None, None, None, None, 0.0, eps, 1, "layer_norm", None, False)[0]
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("absent", ["residual", "weight", "bias", "residual weight bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_any_part_may_be_absent(norm: str, dtype: torch.dtype, absent: str) -> None:
    for p in (0.0, P):
        assert_exact(inputs(norm, dtype) | dict.fromkeys(absent.split()), norm, p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_sizes_of_a_real_layer(norm: str, dtype: torch.dtype) -> None:
    shapes = {"x": (128, 768), "residual": (128, 768), "weight": (768,), "bias": (768,)}
    values: dict[str, Any] = {
        name: torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for name, shape in shapes.items()
    }
    assert_exact(values | ({"bias": None} if norm == "rms_norm" else {}), norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", [0.0, P, 1.0])
def test_float64_equals_the_reference(norm: str, p: float) -> None:
    values = inputs(norm, torch.float64)
    exact = run(by_reference, values, norm, p)
    for name, value in run(ours, values, norm, p).items():
        # With p = 1 each row of z is the residual, so the same bounds hold.
        torch.testing.assert_close(value, exact[name], rtol=1e-11, atol=1e-12)


def test_a_large_mean_costs_no_digits() -> None:
    """The one-pass variance E[z²] - E[z]² would be off by everything here."""
    values = inputs() | {"residual": None}
    values["x"] = (values["x"].detach() + 1e4).requires_grad_()
    assert_exact(values, "layer_norm", 0.0)


@pytest.mark.parametrize("norm", NORMS)
def test_constant_rows(norm: str) -> None:
    """No variance: LayerNorm gives its bias, and only eps keeps RMSNorm of zeros finite."""
    value = 0.0 if norm == "rms_norm" else 3.0
    values = inputs(norm) | {"residual": None, "x": torch.full((3, 24), value, requires_grad=True)}
    for name, result in run(ours, values, norm, 0.0).items():
        assert torch.isfinite(result).all(), name
    expected = values["bias"].expand(3, 24) if norm == "layer_norm" else torch.zeros(3, 24)
    assert torch.equal(ours(values, norm, 0.0), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_and_second_gradients(norm: str, p: float, residual: bool) -> None:
    values = inputs(norm, torch.float64, rows=(2, 2)) | ({} if residual else {"residual": None})
    tensors = [values[name] for name in NAMES]
    with_sum = residual or p > 0

    def function(*leaves: Tensor) -> Any:
        y, z = both(dict(zip(NAMES, leaves, strict=True)), norm, p)
        return (y, z) if with_sum else y

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("norm", NORMS)
def test_several_normalised_dimensions(norm: str) -> None:
    x, residual = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    weight = torch.randn(5, 8, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    keep = random_bits.keep_mask(torch.tensor(SEED), 3, 40, P).view(3, 5, 8)
    z = torch.where(keep, x / (1 - P), 0.0) + residual
    exact = F.layer_norm(z, (5, 8), weight, None, EPS) if norm == "layer_norm" else F.rms_norm(z, (5, 8), weight, EPS)
    y, own_z, *_ = ops.dropout_norm(x, residual, weight, None, torch.tensor(SEED), P, EPS, 2, norm, None, False)
    torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(own_z, z)
    grad = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(exact, leaves, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("used", ["only y", "only z", "y and z"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("norm", NORMS)
def test_either_output_may_go_unused(norm: str, dtype: torch.dtype, used: str) -> None:
    def result(values: dict[str, Any], fused: bool) -> Tensor:
        if fused:
            y, z = both(values, norm)
        else:
            dropped = torch.where(keep_of(values["x"], P), values["x"] / (1 - P), 0.0)
            z, y = dropped + values["residual"], by_reference(values, norm)
        return {"only y": y, "only z": z, "y and z": torch.cat([y, z])}[used]

    values = inputs(norm, dtype)
    mine, eager = run(result, values, True), run(result, values, False)
    for name, exact in run(result, wide(values), False).items():
        assert_as_exact_as_eager(mine[name], eager[name], exact, name)


def test_statistics_are_those_of_the_sum() -> None:
    values = inputs(dtype=torch.bfloat16)
    _, z, statistics = ops.dropout_norm(*(values[name] for name in NAMES), *settings())
    assert statistics.dtype is torch.float32
    assert statistics.shape == (2, 3, 5, 1)
    mean, rstd = statistics
    torch.testing.assert_close(mean, z.float().mean(-1, keepdim=True))
    torch.testing.assert_close(rstd, (z.float().var(-1, correction=0, keepdim=True) + EPS).rsqrt())
    assert not statistics.requires_grad
    assert z.requires_grad


def test_dropped_places_hide_what_stood_there() -> None:
    x, keep = torch.randn(4, 24), keep_of(torch.empty(4, 24), P)
    assert keep is not None
    poisoned = x.masked_fill(~keep, float("nan"))
    values = inputs(rows=(4,))
    assert torch.equal(ours(values | {"x": poisoned}), ours(values | {"x": x}))


@pytest.mark.parametrize("residual_first", [False, True])
def test_layout_of_the_sum_is_that_of_eager(residual_first: bool) -> None:
    x, residual = torch.randn(5, 24).t().contiguous().t(), torch.randn(5, 24)
    _, z, *_ = ops.dropout_norm(x, residual, None, None, None, 0.0, EPS, 1, "layer_norm", None, residual_first)
    eager = residual + x if residual_first else x + residual
    assert torch.equal(z, eager)
    assert z.stride() == eager.stride()


@pytest.mark.parametrize("norm", NORMS)
def test_cast_before_the_norm(norm: str) -> None:
    """`norm((dropout(x) + residual).float())` in bfloat16."""
    values = inputs(norm, torch.bfloat16) | {"weight": torch.randn(24).requires_grad_(), "bias": None}

    def fused(values: dict[str, Any]) -> Tensor:
        y: Tensor = ops.dropout_norm(*(values[name] for name in NAMES), *settings(norm, P, torch.float32))[0]
        return y

    def cast(values: dict[str, Any]) -> Tensor:
        dropped = torch.where(keep_of(values["x"], P), values["x"] * (1 / (1 - P)), 0.0)
        z = (dropped + values["residual"]).to(torch.promote_types(dropped.dtype, torch.float32))
        return F.layer_norm(z, (24,), values["weight"]) if norm == "layer_norm" else F.rms_norm(
            z, (24,), values["weight"], EPS
        )  # fmt: skip

    mine, eager = run(fused, values), run(cast, values)
    for name, exact in run(cast, wide(values)).items():
        assert_as_exact_as_eager(mine[name], eager[name], exact, name)
    assert mine["y"].dtype is torch.float32
    assert mine["x"].dtype is torch.bfloat16


# --- which gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("frozen", [f"{i:04b}" for i in range(1, 15)])
def test_frozen_tensors_get_no_gradient_and_change_no_other(frozen: str, p: float) -> None:
    values = inputs()
    full = run(ours, values, "layer_norm", p)
    for name, bit in zip(NAMES, frozen, strict=True):
        values[name].requires_grad_(bit == "0")
    for name, grad in run(ours, values, "layer_norm", p).items():
        assert torch.equal(grad, full[name]), name
    ours(values, "layer_norm", p).sum().backward()
    assert {name for name in NAMES if values[name].grad is None} == {
        name for name, bit in zip(NAMES, frozen, strict=True) if bit == "1"
    }


@pytest.mark.parametrize("p", [0.0, P])
def test_gradients_of_x_and_residual_share_no_memory(p: float) -> None:
    values = inputs()
    ours(values, "layer_norm", p).pow(2).sum().backward()
    x, residual = values["x"].grad, values["residual"].grad
    assert x.untyped_storage().data_ptr() != residual.untyped_storage().data_ptr()


# --- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", [True, False])
def test_saved_are_the_sum_and_the_statistics(norm: str, p: float, residual: bool) -> None:
    values, saved = inputs(norm), []
    values = values if residual else values | {"residual": None}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()) or t, lambda t: t):
        _, z, statistics = ops.dropout_norm(*(values[name] for name in NAMES), *settings(norm, p))
    z = z if residual or p else values["x"]
    known = [t.detach() for t in (z, statistics, values["weight"], *([torch.tensor(SEED)] if p else []))]
    assert len(saved) == len(known)
    for tensor, expected in zip(saved, known, strict=True):
        assert torch.equal(tensor, expected)
    assert [t.shape for t in saved if t.numel() == z.numel()] == [z.shape]
    assert not [t for t in saved if not t.is_floating_point() and t.dim() > 0]


# --- autocast, export, fake tensors, opcheck --------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_cpu_autocast_gives_the_dtype_of_eager(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    of_x, of_parameters = dtypes
    values = inputs()
    values = {n: v.detach().to(of_x if n in ("x", "residual") else of_parameters) for n, v in values.items()}
    with torch.autocast("cpu", torch.bfloat16):
        eager, result = by_reference(values, p=0.0), ours(values, p=0.0)
    assert_as_exact_as_eager(result, eager, by_reference(wide(values), p=0.0))


class Calling(nn.Module):
    """A module that calls the op by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        parameters = (self.norm.weight, self.norm.bias)
        y: Tensor = ops.dropout_norm(x, residual, *parameters, None, 0.0, EPS, 1, "layer_norm", None, False)[0]
        return y


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic: bool) -> None:
    module, x, residual = Calling(), torch.randn(3, 5, 24), torch.randn(3, 5, 24)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        module, (x, residual), dynamic_shapes={"x": batch, "residual": batch} if dynamic else None
    )
    assert "fuse_pass.dropout_norm.default" in program.graph_module.code
    for rows in (3, 7) if dynamic else (3,):
        x, residual = torch.randn(rows, 5, 24), torch.randn(rows, 5, 24)
        torch.testing.assert_close(program.module()(x, residual), module.norm(x + residual))


@pytest.mark.parametrize("norm", NORMS)
def test_fake_tensors_with_symbolic_sizes(norm: str) -> None:
    values = inputs(norm)
    with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = {
            name: None if value is None else mode.from_tensor(value, static_shapes=name in ("weight", "bias"))
            for name, value in values.items()
        }
        y, z, statistics = ops.dropout_norm(*(fake[name] for name in NAMES), *settings(norm, 0.0))
    assert isinstance(y.shape[0], torch.SymInt)
    assert y.shape == z.shape == fake["x"].shape
    assert [*statistics.shape] == [2, *fake["x"].shape[:-1], 1]


_STATISTICS = torch.stack((torch.zeros(3, 5, 1), torch.ones(3, 5, 1)))
OPCHECKS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "forward": (ops.dropout_norm, lambda: (*inputs().values(), *settings())),
    "forward without a sum": (
        ops.dropout_norm,
        lambda: (inputs()["x"], None, inputs()["weight"], None, *settings("rms_norm", 0.0)),
    ),
    "forward, cast": (
        ops.dropout_norm,
        lambda: (*inputs(dtype=torch.bfloat16).values(), *settings(norm_dtype=torch.float32)),
    ),
    **{
        f"backward {case}": (
            ops.dropout_norm_backward,
            lambda grads=grads, x_dtype=x_dtype, wanted=wanted: (
                *(torch.randn(3, 5, 24) if given else None for given in grads),
                *(torch.randn(3, 5, 24), _STATISTICS, torch.ones(24), x_dtype, *settings()),
                wanted,
            ),
        )
        for case, grads, x_dtype, wanted in (
            ("of all", (True, True), None, [True] * 4),
            ("of all, x in its own dtype", (True, True), torch.bfloat16, [True] * 4),
            ("of y alone", (True, False), None, [True, False, False, False]),
            ("of z alone", (False, True), None, [True, True, True, True]),
            ("of z alone for x", (False, True), None, [False, True, False, False]),
        )
    },
}


@pytest.mark.filterwarnings("error:.*may not alias.*")
@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case: str) -> None:
    op, arguments = OPCHECKS[case]
    torch.library.opcheck(op.default, arguments())


@pytest.mark.parametrize("dynamic", [False, True])
def test_dropout_in_forward_and_backward_is_the_same_when_compiled(dynamic: bool) -> None:
    """z of ones without a residual shows the mask, and so does its gradient; also for a rate that changes."""
    seed = torch.tensor(SEED)

    def step(x: Tensor, p: float) -> Tensor:
        z: Tensor = ops.dropout_norm(x, None, None, None, seed, p, EPS, 1, "layer_norm", None, False)[1]
        return z

    compiled = torch.compile(step, backend="inductor", dynamic=dynamic)
    for p in (0.3, 0.6):
        x = torch.ones(32, 64, requires_grad=True)
        z = compiled(x, p)
        z.sum().backward()
        assert torch.equal(z != 0, random_bits.keep_mask(seed, 32, 64, p))
        assert x.grad is not None
        torch.testing.assert_close(x.grad, z.detach())
