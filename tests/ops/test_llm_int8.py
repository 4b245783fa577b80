"""LLM.int8 against the formula of the paper (2208.07339 §3), written in NumPy with int64 sums and float64 scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.gemm import integers
from fuse_pass.ops.llm_int8 import llm_int8_linear, quantize_rows

D_IN, D_OUT, ROWS = 24, 10, 6
THRESHOLDS = [0.0, 0.5, 1.5, 2.5, 6.0, 1e6, float("inf")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Array = np.ndarray[Any, Any]


def quantized(matrix: Array) -> tuple[Array, Array]:
    """Steps (int64) and scales of the rows. No value may lie so near a tie that float32 could take it for one."""
    absmax = np.abs(matrix).max(1, keepdims=True)
    exact = 127 * matrix / np.where(absmax == 0, 1, absmax)
    distance = np.abs(exact - np.floor(exact) - 0.5)
    assert not ((distance > 0) & (distance < 1e-5)).any()
    return np.rint(exact).astype(np.int64), absmax / 127


def reference(x: Array, weight: Array, bias: Array | None, threshold: float) -> Array:
    outlier = np.abs(x).max(0) > threshold if threshold > 0 else np.zeros(x.shape[1], bool)
    steps, scale = quantized(np.where(outlier, 0, x))
    weight_steps, weight_scale = quantized(weight)
    y = (steps @ weight_steps.T) * scale * weight_scale.T
    y = y + x[:, outlier] @ weight[:, outlier].T
    return y if bias is None else y + bias


def inputs(
    dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype = torch.float16, shape: tuple[int, ...] = (ROWS,)
) -> tuple[Tensor, Tensor, Tensor]:
    """x with three large columns (about 2, 4 and 9), weight and bias."""
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((*shape, D_IN), (D_OUT, D_IN), (D_OUT,))
    )
    x = x.clamp(-1.4, 1.4)
    for column, value in ((3, 2.13), (11, -4.27), (17, 9.31)):
        x[..., -1:, column] = value
    return x.to(dtype), weight.to(weight_dtype), bias.float()


def numpy(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()  # type: ignore[no-any-return]


def assert_equal_up_to_rounding(y: Tensor, expected: Array) -> None:
    """The integers are the same, so only the float32 scales and sums and the dtype of y are rounded."""
    eps = torch.finfo(y.dtype).eps + torch.finfo(torch.float32).eps
    np.testing.assert_allclose(numpy(y), expected, rtol=2 * eps, atol=2 * eps * np.abs(expected).max())


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_formula_of_the_paper(dtype: torch.dtype, threshold: float, with_bias: bool) -> None:
    x, weight, bias = inputs(dtype)
    bias = bias if with_bias else None
    y = llm_int8_linear(x, weight, bias, threshold=threshold)
    assert y.dtype is dtype
    expected = reference(numpy(x), numpy(weight), None if bias is None else numpy(bias), threshold)
    assert_equal_up_to_rounding(y, expected)


def test_float64_is_computed_in_float64() -> None:
    x, weight, _ = inputs(torch.float64, torch.float64)
    y = llm_int8_linear(x, weight, threshold=2.5)
    np.testing.assert_allclose(y.numpy(), reference(numpy(x), numpy(weight), None, 2.5), rtol=1e-13, atol=1e-13)


def test_thresholds_change_the_result_and_the_error_falls_with_more_columns_in_floating_point() -> None:
    x, weight, _ = inputs(torch.float64)
    exact = F.linear(x, weight.double())
    errors = [(llm_int8_linear(x, weight, threshold=t) - exact).norm().item() for t in (1e6, 6.0, 2.5, 1e-9)]
    assert errors[0] > errors[1] > errors[2] > 1e-4
    assert errors[3] < 1e-6  # every column is an outlier


def test_a_value_at_the_threshold_is_no_outlier() -> None:
    x, weight, _ = inputs()
    top = x.abs().max().item()
    at, none = (llm_int8_linear(x, weight, threshold=t) for t in (top, 0.0))
    below = llm_int8_linear(x, weight, threshold=np.nextafter(np.float32(top), np.float32(0)).item())
    assert torch.equal(at, none)
    assert not torch.equal(below, none)


def test_outlier_columns_are_those_of_all_rows_of_all_leading_dimensions() -> None:
    x, weight, bias = inputs(shape=(2, 3))
    y = llm_int8_linear(x, weight, bias, threshold=2.5)
    assert y.shape == (2, 3, D_OUT)
    expected = reference(numpy(x.flatten(0, 1)), numpy(weight), numpy(bias), 2.5)
    assert_equal_up_to_rounding(y.flatten(0, 1), expected)


@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_error_against_floating_point_is_that_of_half_a_step(threshold: float) -> None:
    x, weight = torch.randn(64, 96, dtype=torch.float64), torch.randn(48, 96).half()
    x[:, 5] *= 20
    kept = torch.where((x.abs() > threshold).any(0), 0.0, x) if threshold else x
    x_step, weight_step = (t.abs().amax(1) / 127 for t in (kept, weight.double()))
    rounded = kept.abs() + x_step[:, None] / 2
    bound = 0.5 * (
        x_step[:, None] * ((kept != 0).double() @ weight.double().abs().T) + rounded.sum(1)[:, None] * weight_step
    )
    error = (llm_int8_linear(x, weight, threshold=threshold) - F.linear(x, weight.double())).abs()
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > bound.max() / 100  # the bound is not empty


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_stored_weights_give_the_bits_of_weights_quantized_on_the_way(threshold: float) -> None:
    x, weight, bias = inputs()
    steps, scale = quantize_rows(weight)
    stored = llm_int8_linear(x, steps, bias, scale=scale, threshold=threshold)
    dequantized = steps.float() * scale[:, None]
    if threshold in (0.0, 1e6, float("inf")):  # no outliers
        assert torch.equal(stored, llm_int8_linear(x, weight, bias, threshold=threshold))
    torch.testing.assert_close(stored, llm_int8_linear(x, dequantized, bias, threshold=threshold), rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_give_the_bias() -> None:
    x, weight, bias = inputs()
    x[2] = 0
    weight[4] = 0
    for threshold in THRESHOLDS:
        y = llm_int8_linear(x, weight, bias, threshold=threshold)
        assert torch.equal(y[2], bias)
        assert torch.equal(y[:, 4], bias[4].expand(ROWS))
        assert not llm_int8_linear(torch.zeros_like(x), torch.zeros_like(weight), threshold=threshold).any()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("size", [1e5, 1e30, 3e38])
def test_activations_that_float16_cannot_hold(size: float, threshold: float) -> None:
    x, weight, _ = inputs()
    x = (x / x.abs().max() * size).contiguous()
    y = llm_int8_linear(x, weight * 0.01, threshold=threshold)
    exact = F.linear(x.double(), (weight * 0.01).double())
    assert torch.isfinite(y).all()
    assert (y - exact).norm() < 0.02 * exact.norm()


def test_nan_and_infinity_stay_in_their_row() -> None:
    x, weight, _ = inputs()
    clean = llm_int8_linear(x, weight, threshold=6.0)
    x[1, 17], x[2, 0] = float("inf"), float("nan")  # column 17 is an outlier column, column 0 is not
    y = llm_int8_linear(x, weight, threshold=6.0)
    assert torch.equal(y[[0, 3, 4, 5]], clean[[0, 3, 4, 5]])
    assert y[2].isnan().all()
    assert torch.equal(y[1], torch.where(weight[:, 17] > 0, float("inf"), float("-inf")))
    assert llm_int8_linear(x, weight, threshold=0.0)[1].isnan().all()


@pytest.mark.parametrize("shape", [(D_IN,), (1, D_IN), (0, D_IN), (2, 0, D_IN), (2, 3, 4, D_IN)])
def test_any_rank_and_empty_batches(shape: tuple[int, ...]) -> None:
    _, weight, bias = inputs()
    x = torch.randn(shape, requires_grad=True)
    y = llm_int8_linear(x, weight.requires_grad_(), bias, threshold=1.0)
    y.sum().backward()
    assert y.shape == (*shape[:-1], D_OUT)
    assert x.grad.shape == shape
    assert weight.grad.shape == weight.shape


def test_no_input_features() -> None:
    bias = torch.randn(3)
    assert torch.equal(llm_int8_linear(torch.empty(2, 0), torch.empty(3, 0), bias), bias.expand(2, 3))


def test_nothing_is_changed_in_place_and_strides_do_not_matter() -> None:
    x, weight, bias = (t.detach().requires_grad_() for t in inputs())
    before = [t.detach().clone() for t in (x, weight, bias)]
    y = llm_int8_linear(x, weight, bias, threshold=2.5)
    y.pow(2).sum().backward()
    assert all(torch.equal(t, old) for t, old in zip((x, weight, bias), before, strict=True))
    strided = [t.detach().t().contiguous().t() for t in (x, weight)]
    torch.testing.assert_close(llm_int8_linear(*strided, bias, threshold=2.5), y)


def test_without_the_library_the_layer_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = inputs()
    expected = llm_int8_linear(x, weight, bias)
    monkeypatch.setattr(integers, "cpu_int_mm_is_exact", lambda: False)
    assert torch.equal(llm_int8_linear(x, weight, bias), expected)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [False, True], ids=["float16 weight", "int8 weight"])
def test_gradients_are_those_of_the_float_layer(dtype: torch.dtype, activation: str | None, stored: bool) -> None:
    x, weight, bias = inputs(dtype, shape=(2, 3))
    steps, scale = quantize_rows(weight)
    leaves = [x.requires_grad_(), bias.requires_grad_()] + ([] if stored else [weight.requires_grad_()])
    y = llm_int8_linear(
        x, steps if stored else weight, bias, scale=scale if stored else None, threshold=2.5, activation=activation
    )
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(dtype)
    found = torch.autograd.grad(y, leaves, grad)

    wide = [t.detach().double().requires_grad_() for t in (x, bias, steps * scale[:, None] if stored else weight)]
    function = {None: lambda h: h, "gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"), "relu": F.relu}
    exact = torch.autograd.grad(
        F.linear(function[activation](wide[0]), wide[2], wide[1]), wide[: len(leaves)], grad.double()
    )
    for leaf, ours, theirs in zip(leaves, found, exact, strict=True):
        assert ours.dtype is leaf.dtype
        eps = torch.finfo(leaf.dtype).eps + torch.finfo(dtype).eps + torch.finfo(torch.float32).eps
        scale_of = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=4 * eps, atol=4 * eps * scale_of)


@pytest.mark.parametrize("wanted", [f"{i:03b}" for i in range(1, 8)])
def test_only_wanted_gradients(wanted: str) -> None:
    leaves = inputs()
    full = [t.detach().clone().requires_grad_() for t in leaves]
    llm_int8_linear(*full).sum().backward()
    some = [t.detach().clone().requires_grad_(bit == "1") for t, bit in zip(leaves, wanted, strict=True)]
    llm_int8_linear(*some).sum().backward()
    for ours, other in zip(some, full, strict=True):
        assert torch.equal(ours.grad, other.grad) if ours.requires_grad else ours.grad is None


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_second_derivatives_are_those_of_the_float_layer(activation: str | None) -> None:
    x, weight, _ = (t.double().requires_grad_() for t in inputs())
    grad_y = torch.randn(ROWS, D_OUT, dtype=torch.float64, requires_grad=True)
    second = []
    for y in (llm_int8_linear(x, weight, activation=activation), F.linear(F.gelu(x) if activation else x, weight)):
        first = torch.autograd.grad(y, (x, weight), grad_y, create_graph=True)
        second.append(torch.autograd.grad(sum(g.sin().sum() for g in first), (x, weight, grad_y)))
    torch.testing.assert_close(*second)


def test_only_x_and_the_weight_are_saved() -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs())
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        llm_int8_linear(x, weight, bias, threshold=2.5, activation="gelu")
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


# --- compiled, autocast, transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "threshold", "stored"),
    [(torch.float32, 2.5, False), (torch.float32, 2.5, True), (torch.bfloat16, 2.5, False),
     (torch.float16, 0.0, False)],
)  # fmt: skip
def test_compiled_equals_eager_bit_for_bit(dtype: torch.dtype, threshold: float, stored: bool) -> None:
    x, weight, bias = inputs(dtype, shape=(4, 8))
    steps, scale = quantize_rows(weight)
    leaves = [x.requires_grad_(), bias.requires_grad_()] + ([] if stored else [weight.requires_grad_()])

    def run(x: Tensor) -> Tensor:
        given = (steps, bias, scale) if stored else (weight, bias, None)
        return llm_int8_linear(x, *given[:2], scale=given[2], threshold=threshold)

    compiled = torch.compile(run, fullgraph=True)
    grad = torch.linspace(-1, 1, 4 * 8 * D_OUT).view(4, 8, D_OUT).to(dtype)
    eager_y, y = run(x), compiled(x)
    assert torch.equal(y, eager_y)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(eager_y, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(compiled(x), eager_y)


def test_one_dynamic_graph_serves_all_sizes_and_inputs() -> None:
    _, weight, bias = inputs()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(
        lambda x: llm_int8_linear(x, weight, bias, threshold=2.0), backend=counter, fullgraph=True, dynamic=True
    )
    for rows, size in ((3, 1.0), (7, 10.0), (12, 0.1), (40, 0.0)):
        x = torch.randn(rows, D_IN) * size
        torch.testing.assert_close(compiled(x), llm_int8_linear(x, weight, bias, threshold=2.0))
    assert counter.frame_count == 1


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_opcheck(activation: str | None, stored: bool, threshold: float) -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs())
    steps, scale = quantize_rows(weight.detach())
    weights = (steps, scale) if stored else (weight, None)
    torch.library.opcheck(torch.ops.fuse_pass.llm_int8_linear, (x, *weights, bias, threshold, activation))
    torch.library.opcheck(
        torch.ops.fuse_pass.llm_int8_linear_backward,
        (torch.randn(ROWS, D_OUT), x.detach(), *(t if t is None else t.detach() for t in weights), activation,
         [True, not stored, True]),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fuse_pass.int8_product, (steps, steps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_result_only(dtype: torch.dtype) -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs())
    with torch.autocast("cpu", dtype):
        y = llm_int8_linear(x, weight, bias, threshold=2.5)
        huge = llm_int8_linear(x.detach() * 1e5, weight.detach() * 1e-4)
        assert llm_int8_linear(x.double(), weight).dtype is torch.float64
    assert torch.equal(y, llm_int8_linear(x, weight, bias, threshold=2.5).to(dtype))
    assert torch.isfinite(huge).all()
    y.float().sum().backward()
    assert x.grad.dtype is torch.float32


def test_transforms() -> None:
    x, weight, bias = inputs(shape=(4, 3))

    def loss(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return llm_int8_linear(x, weight, bias, threshold=2.5, activation="gelu").float().square().sum()

    each = torch.stack([loss(row, weight, bias) for row in x])
    torch.testing.assert_close(torch.func.vmap(loss, (0, None, None))(x, weight, bias), each)
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None, None))(x, weight, bias)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    for i in range(4):
        found = torch.autograd.grad(loss(leaves[0][i], leaves[1], bias), leaves)
        torch.testing.assert_close(grads[0][i], found[0][i])
        torch.testing.assert_close(grads[1][i], found[1])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 7), torch.ones(3, D_IN, dtype=torch.long), torch.ones(3, D_IN) == 1, torch.tensor(1.0),
     torch.ones(3, D_IN, dtype=torch.complex64)],
    ids=["size", "integers", "booleans", "0-d", "complex"],
)  # fmt: skip
@pytest.mark.parametrize("stored", [False, True])
def test_wrong_input_raises_what_torch_raises(x: Tensor, stored: bool) -> None:
    _, weight, bias = inputs()
    with pytest.raises(RuntimeError) as expected:
        F.linear(x, weight.float(), bias)
    steps, scale = quantize_rows(weight)
    with pytest.raises(RuntimeError) as ours:
        llm_int8_linear(x, *((steps, bias) if stored else (weight.float(), bias)), scale=scale if stored else None)
    assert str(ours.value) == str(expected.value)


def test_wrong_weights() -> None:
    x, weight, _ = inputs()
    steps, scale = quantize_rows(weight)
    for given, given_scale in ((steps, None), (weight, scale)):
        with pytest.raises(ValueError, match="expected an int8 weight with its scale"):
            llm_int8_linear(x, given, scale=given_scale)
    with pytest.raises(ValueError, match="131071"):
        llm_int8_linear(torch.empty(1, 131072, device="meta"), torch.empty(2, 131072, device="meta"))
    with pytest.raises(RuntimeError, match="device"):
        llm_int8_linear(x.to("meta"), weight)
