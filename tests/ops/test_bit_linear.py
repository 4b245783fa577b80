"""BitLinear's integers, packing, values and gradients, against float64 NumPy written from the papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fuse_pass.numerics import bit_codes
from fuse_pass.ops.bit_linear import bit_linear_formula, straight_through_weight

ops = torch.ops.fuse_pass
VARIANTS = ("b1", "b1.58")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS: dict[str, tuple[int, ...]] = {"rank 1": (), "rank 2": (5,), "rank 4": (2, 3, 5), "empty": (0, 5)}
IN, OUT = 13, 6
Matrix = NDArray[np.float64]


def papers_weight(weight: Matrix, groups: int, variant: str) -> tuple[Matrix, Matrix]:
    """W̃ and β of each row (2310.11453 §2.1 with one group per block of rows; 2402.17764 §2)."""
    codes, scales = [], []
    for rows in np.split(weight, groups):
        size = np.abs(rows).mean()
        if variant == "b1":
            codes.append(np.where(rows - rows.mean() > 0, 1.0, -1.0))
        else:
            codes.append(np.clip(np.rint(rows / (size + 1e-300)), -1, 1))
        scales += [size] * len(rows)
    return np.concatenate(codes), np.array(scales)


def papers_activations(x: Matrix, variant: str) -> tuple[Matrix, Matrix]:
    """x̃ and γ / Q, for a matrix of tokens."""
    gamma = np.abs(x).max(axis=None if variant == "b1" else 1, keepdims=True, initial=0)
    return np.rint(x * 127 / np.where(gamma == 0, 1, gamma)), gamma / 127


def papers(x: Matrix, weight: Matrix, bias: Matrix, groups: int, variant: str) -> Matrix:
    w_codes, beta = papers_weight(weight, groups, variant)
    x_codes, step = papers_activations(x.reshape(-1, x.shape[-1]), variant)
    return ((x_codes @ w_codes.T) * step * beta + bias).reshape(*x.shape[:-1], len(weight))


def wide(tensor: Tensor) -> Matrix:
    return tensor.detach().double().numpy()


def inputs(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (5,)) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((*rows, IN), (OUT, IN), (OUT,))
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)  # type: ignore[return-value]


def weight_integers(weight: Tensor, groups: int, variant: str) -> tuple[Tensor, Tensor]:
    threshold, scale = bit_codes.weight_statistics(weight, groups, variant)
    return bit_codes.weight_codes(weight, threshold, variant), scale


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_integers_are_those_of_the_papers(variant: str, dtype: torch.dtype, groups: int) -> None:
    x, weight, _ = (t.detach() for t in inputs(dtype, (50,)))
    x_codes, step = bit_codes.activation_codes(x, variant)
    expected_x, expected_step = papers_activations(wide(x), variant)
    assert np.array_equal(wide(x_codes), expected_x)
    np.testing.assert_allclose(wide(step), expected_step, rtol=2e-7)
    w_codes, scale = weight_integers(weight, groups, variant)
    expected_w, expected_scale = papers_weight(wide(weight), groups, variant)
    assert w_codes.dtype is torch.int8
    assert np.array_equal(wide(w_codes), expected_w)
    assert scale.dtype is dtype
    np.testing.assert_allclose(
        wide(bit_codes.per_row(scale, OUT)), expected_scale, rtol=max(torch.finfo(dtype).eps / 2, 1e-15)
    )


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values(variant: str, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    x, weight, bias = inputs(dtype, rows)
    y, _, _ = ops.bit_linear(x, weight, bias, 2, variant, None)
    expected = papers(wide(x), wide(weight), wide(bias), 2, variant)
    assert (y.dtype, tuple(y.shape)) == (dtype, (*rows, OUT))
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(wide(y), expected, rtol=4 * eps, atol=4 * eps * np.abs(expected).max(initial=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_is_rounded_right(dtype: torch.dtype) -> None:
    """Each against maxima of its own: ties are ties (0.5 of 1 is 63.5 steps), nothing overflows, subnormals count."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    for largest in (finite.abs().max().item(), 1.0, 1.5, 191 / 128, 0.75 * torch.finfo(dtype).tiny):
        x = finite[finite.abs() <= largest].sort().values
        codes, _ = bit_codes.activation_codes(x[None], "b1.58")
        assert np.array_equal(wide(codes[0]), np.rint(wide(x) * 127 / wide(x).max()))


def test_ties_go_to_even_and_sign_of_zero_is_minus_one() -> None:
    codes, _ = bit_codes.activation_codes(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), "b1")
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]
    codes, _ = weight_integers(torch.tensor([[1.0, 2.0, 3.0]]), 1, "b1")  # mean 2
    assert codes.tolist() == [[-1, -1, 1]]
    codes, _ = weight_integers(torch.tensor([[4.0, -1.0, 1.0, -2.0]]), 1, "b1.58")  # mean size 2, W / 2 = 2, ±0.5, −1
    assert codes.tolist() == [[1, 0, 0, -1]]


def test_thresholds_are_rounded_down() -> None:
    """So that w > threshold means the same in float32 as in float64, for numbers between two float32 and on them."""
    on = torch.tensor([0.0, 1.0, -1.0, 2.0**-149, -(2.0**-126), 1.1, -1.1], dtype=torch.float32).double()
    gap = torch.tensor([2.0**-149, 2.0**-23, 2.0**-24, 2.0**-149, 2.0**-149, 2.0**-23, 2.0**-23], dtype=torch.float64)
    for fraction in (0.0, 0.25, 0.5, 0.75):
        rounded = bit_codes._round_down(on + fraction * gap, torch.float32)
        assert torch.equal(rounded.double(), on)
        assert rounded.dtype is torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_weights_do_not_depend_on_how_a_mean_is_rounded(dtype: torch.dtype) -> None:
    for value in (0.1, -0.3, 1 / 3):
        codes, scale = weight_integers(torch.full((7, 1001), value, dtype=dtype), 1, "b1")
        assert bool((codes == -1).all())
        assert scale.item() == torch.tensor(abs(value), dtype=dtype).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_the_weights_does_not_show(variant: str) -> None:
    weight = torch.randn(1, 100_003)
    shuffled = weight[:, torch.randperm(weight.shape[1])]
    for first, second in zip(*(bit_codes.weight_statistics(w, 1, variant) for w in (weight, shuffled)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_features", [100_000, 140_001])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_of_many_terms_are_exact(variant: str, in_features: int, dtype: torch.dtype) -> None:
    """The second size reaches sums beyond 2^24, where not every integer is a float32."""
    generator = np.random.default_rng(0)
    weight = torch.from_numpy(generator.normal(1, 2, (3, in_features))).to(dtype)
    x = torch.from_numpy(generator.normal(3, 1, (2, in_features))).to(dtype)
    w_codes, _ = weight_integers(weight, 1, variant)
    x_codes, _ = bit_codes.activation_codes(x, variant)
    expected = wide(x_codes) @ wide(w_codes).T
    assert np.array_equal(ops.int8_product(x_codes.to(torch.int8), w_codes).numpy(), expected)
    y = ops.bit_linear(x, weight, None, 1, variant, None)[0]
    zero = np.zeros(3)
    np.testing.assert_allclose(
        wide(y), papers(wide(x), wide(weight), zero, 1, variant), rtol=4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("magnitude", [2.0**-147, 2.0**-130, 2.0**-100, 2.0**100, 1.75 * 2.0**127])
@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_of_any_magnitude(variant: str, magnitude: float) -> None:
    pattern = torch.tensor([[1.0, 0.5, -0.25, 0.0, -1.0]])
    codes, _ = bit_codes.activation_codes(pattern * magnitude, variant)
    expected, _ = papers_activations(wide(pattern * magnitude), variant)
    assert np.array_equal(wide(codes), expected)


def test_division_by_way_of_float64_rounds_as_float32_does() -> None:
    """What stands in for a float32 division on a GPU; numerators and denominators of full length."""
    a, b = (torch.randint(2**23, 2**24, (1_000_000,)).float() for _ in range(2))
    assert torch.equal((a.double() / b.double()).float(), a / b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_and_infinity_are_not_hidden(variant: str) -> None:
    _, weight, _ = inputs()
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, IN)
        x[1, 3] = bad
        y = ops.bit_linear(x, weight, None, 1, variant, None)[0]
        assert not y[1].isfinite().any()
        assert y[0].isfinite().all() == (variant == "b1.58")  # per tensor, or per token


# --- gradients --------------------------------------------------------------------------------------------------------


def by_hand(x: Tensor, weight: Tensor, grad_y: Matrix, groups: int, variant: str) -> tuple[Matrix, Matrix, Matrix]:
    """dx = dy Ŵ, dW = dyᵀ x̂, dbias = Σ dy, with Ŵ = β W̃ and x̂ = x̃ γ / Q."""
    w_codes, beta = papers_weight(wide(weight), groups, variant)
    x_codes, step = papers_activations(wide(x).reshape(-1, IN), variant)
    grad = grad_y.reshape(-1, OUT)
    return (grad @ (w_codes * beta[:, None])).reshape(x.shape), grad.T @ (x_codes * step), grad.sum(0)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_straight_through(
    variant: str, dtype: torch.dtype, rows: tuple[int, ...], create_graph: bool
) -> None:
    tensors = x, weight, bias = inputs(dtype, rows)
    y, *_ = ops.bit_linear(x, weight, bias, 3, variant, None)
    grad_y = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    found = torch.autograd.grad(y, tensors, grad_y, create_graph=create_graph)
    for grad, exact, of in zip(found, by_hand(x, weight, wide(grad_y), 3, variant), tensors, strict=True):
        assert grad.dtype is of.dtype
        eps = 8 * max(torch.finfo(dtype).eps, 1e-15)
        np.testing.assert_allclose(wide(grad), exact, rtol=eps, atol=eps * np.abs(exact).max(initial=0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_gradients_are_straight_through(variant: str) -> None:
    """With v and u on dx and dW: d/dx = u's product with dy, d/dW = v's, d/d(dy) = what forward would make of both."""
    x, weight, _ = inputs(torch.float64)
    y, *_ = ops.bit_linear(x, weight, None, 2, variant, None)
    grad_y, v, u = (torch.randn(shape, dtype=torch.float64) for shape in (y.shape, x.shape, weight.shape))
    grad_y.requires_grad_()
    first = torch.autograd.grad(y, (x, weight), grad_y, create_graph=True)
    found = torch.autograd.grad(first, (x, weight, grad_y), (v, u))
    w_codes, beta = papers_weight(wide(weight), 2, variant)
    x_codes, step = papers_activations(wide(x), variant)
    w_hat, x_hat, grad = w_codes * beta[:, None], x_codes * step, wide(grad_y)
    expected = (grad @ wide(u), grad.T @ wide(v), wide(v) @ w_hat.T + x_hat @ wide(u).T)
    for value, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(wide(value), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_a_packed_weight(variant: str, create_graph: bool) -> None:
    x, weight, bias = inputs()
    codes, scale = weight_integers(weight.detach(), 2, variant)
    y = ops.bit_linear_packed(x, bit_codes.pack_codes(codes, variant), scale, bias, variant, None)
    grad_y = torch.randn(y.shape)
    grads = torch.autograd.grad(y, (x, bias), grad_y, create_graph=create_graph)
    unpacked = torch.autograd.grad(ops.bit_linear(x, weight, bias, 2, variant, None)[0], (x, bias), grad_y)
    torch.testing.assert_close(grads, unpacked)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_one_gradient_alone(wanted: str) -> None:
    tensors = dict(zip(("x", "weight", "bias"), inputs(), strict=True))
    together = torch.autograd.grad(ops.bit_linear(*tensors.values(), 1, "b1", None)[0].sum(), list(tensors.values()))
    alone = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in tensors.items()}
    ops.bit_linear(*alone.values(), 1, "b1", None)[0].sum().backward()
    assert [name for name, tensor in alone.items() if tensor.grad is not None] == [wanted]
    torch.testing.assert_close(alone[wanted].grad, dict(zip(tensors, together, strict=True))[wanted])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_formula_computes_what_the_op_computes(variant: str) -> None:
    tensors = x, weight, bias = inputs(torch.float64)
    ours = ops.bit_linear(x, weight, bias, 2, variant, None)[0]
    formula = bit_linear_formula(x, straight_through_weight(weight, 2, variant), bias, variant)
    torch.testing.assert_close(formula, ours)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), tensors) for y in (formula, ours)))


# --- packing ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(variant=st.sampled_from(VARIANTS), rows=st.integers(0, 9), columns=st.integers(0, 70), seed=st.integers(0, 99))
def test_packing_round_trip(variant: str, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-1, 1] if variant == "b1" else [-1, 0, 1], dtype=torch.int8)
    codes = values[torch.randint(len(values), (rows, columns), generator=generator)]
    packed = bit_codes.pack_codes(codes, variant)
    assert packed.dtype is torch.uint8
    assert packed.shape == (rows, -(-columns * bit_codes.VARIANTS[variant].bits // 8))
    assert torch.equal(bit_codes.unpack_codes(packed, columns, variant), codes)


def test_layout_of_the_bytes() -> None:
    signs = torch.tensor([[1, -1, -1, -1, -1, -1, -1, 1, 1]], dtype=torch.int8)
    assert bit_codes.pack_codes(signs, "b1").tolist() == [[0b1000_0001, 0b1]]
    trits = torch.tensor([[1, 0, -1, 1, 0]], dtype=torch.int8)
    assert bit_codes.pack_codes(trits, "b1.58").tolist() == [[0b10_00_01_10, 0b01]]


@settings(max_examples=200, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    dtype=st.sampled_from(DTYPES),
    groups=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 60),
    kind=st.sampled_from(["normal", "sparse", "one", "constant", "zero"]),
    seed=st.integers(0, 999),
)
def test_representative_weight_is_quantized_to_the_same(
    variant: str, dtype: torch.dtype, groups: int, rows: int, columns: int, kind: str, seed: int
) -> None:
    weight = torch.randn(groups * rows, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "sparse":
        weight = weight**7
    elif kind == "one":
        weight = weight * (torch.arange(weight.numel()).view(weight.shape) % weight[0].numel() == 0)
    elif kind != "normal":
        weight = torch.full_like(weight, 0.3 if kind == "constant" else 0.0)
    weight = weight.to(dtype)
    codes, scale = weight_integers(weight, groups, variant)
    representative = bit_codes.representative_weight(codes, scale, variant)
    again, scale_again = weight_integers(representative, groups, variant)
    assert representative.dtype is dtype
    if variant == "b1.58" or kind != "zero":  # zeros are −1 times a scale of 0, whichever the sign
        assert torch.equal(again, codes)
    if dtype is torch.float64:
        torch.testing.assert_close(scale_again, scale, rtol=1e-13, atol=0)
    else:
        assert torch.equal(scale_again, scale)


# --- as an op ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant: str) -> None:
    x, weight, bias = inputs()
    codes, scale = weight_integers(weight.detach(), 2, variant)
    packed = bit_codes.pack_codes(codes, variant)
    threshold, _ = bit_codes.weight_statistics(weight.detach(), 2, variant)
    grad_y = torch.randn(5, OUT)
    plain = (x.detach(), weight.detach(), threshold, scale)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.bit_linear.default, (x, weight, bias, 2, variant, None)),
        (ops.bit_linear.default, (x, weight, None, 2, variant, torch.bfloat16)),
        (ops.bit_linear_packed.default, (x, packed, scale, bias, variant, None)),
        (ops.bit_linear_backward.default, (grad_y, *plain, variant, [True, True, True])),
        (ops.bit_linear_backward.default, (grad_y, *plain, variant, [False, True, False])),
        (ops.bit_linear_packed_backward.default, (grad_y, packed, scale, IN, variant, [True, True])),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_integers_are_the_eager_ones(variant: str, dtype: torch.dtype) -> None:
    def integers(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        codes, _ = weight_integers(weight, 3, variant)
        packed = bit_codes.pack_codes(codes, variant)
        return (
            codes,
            packed,
            bit_codes.unpack_codes(packed, weight.shape[1], variant),
            bit_codes.activation_codes(x, variant)[0],
        )

    x, weight = torch.randn(200, 301).to(dtype), torch.randn(9, 301).to(dtype)
    for eager, compiled in zip(integers(x, weight), torch.compile(integers, fullgraph=True)(x, weight), strict=True):
        assert torch.equal(eager, compiled)
