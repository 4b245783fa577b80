"""The matrix products: every dtype, stride and size, whoever computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.gemm import measured, onednn, probe
from fuse_pass.gemm import product as products
from fuse_pass.gemm.problem import GemmProblem
from fuse_pass.gemm.providers import Aten, OneDNN, Provider
from fuse_pass.inductor import compat
from fuse_pass.numerics import tensors
from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.numerics.tensors import gradient_like
from fuse_pass.patterns import spellings
from tests.ops.gradients import ROWS, assert_gradients_exact, run
from tests.precision import assert_as_exact_as_eager

example_inputs = spellings.dense.CORPUS.example_inputs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.processor
needs_onednn = pytest.mark.skipif(compat.onednn_linear() is None, reason="this build of PyTorch lacks oneDNN")

# Sizes by name: m rows, n columns, k summed. The large one is above MIN_FLOP, so that a table may choose oneDNN.
SIZES = {"small": (3, 6, 8), "one row": (1, 6, 8), "no row": (0, 6, 8), "one column": (5, 1, 4), "large": (96, 80, 72)}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row-major": lambda matrix: matrix,
    "column-major": lambda matrix: matrix.t().contiguous().t(),
    "every second column": lambda matrix: torch.stack([matrix, matrix], -1).flatten(-2)[:, ::2],
    "padded rows": lambda matrix: F.pad(matrix, (0, 3))[:, : matrix.shape[1]],
    "expanded rows": lambda matrix: matrix[:1].expand(matrix.shape),
    "expanded columns": lambda matrix: matrix[:, :1].expand(matrix.shape),
    "all one number": lambda matrix: matrix[:1, :1].expand(matrix.shape),
}


ATEN, ONEDNN = Aten().name, OneDNN().name


@pytest.fixture(params=[ATEN, ONEDNN])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every product above MIN_FLOP goes to this library, in the dtypes in which this processor lets it multiply."""
    if request.param == ONEDNN and compat.onednn_linear() is None:
        pytest.skip("this build of PyTorch lacks oneDNN")
    prefer(request.param, monkeypatch)
    return str(request.param)


def prefer(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("float32", "bfloat16") if library == ONEDNN else ()
    table = {name + suffix: probe.MIN_FLOP for name in chosen for suffix in ("", "+activation")}
    monkeypatch.setattr(measured, "table", lambda: table)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.append(function.name())
        if isinstance(result, Tensor):
            self.dtypes.append(result.dtype)
        return result


def operands(size: str, dtype: torch.dtype, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    m, n, k = SIZES[size]
    a, b, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((m, k), (n, k), (n,)))
    return a.to(dtype), (b / k**0.5).to(dtype), c.to(dtype) if bias else None


def check(a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    result = products.product(a, b, bias)
    eager = F.linear(a, b, bias)
    exact = F.linear(a.double(), b.double(), None if bias is None else bias.double())
    assert_as_exact_as_eager(result, eager, exact, "product")
    assert result.is_contiguous()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_product(size: str, dtype: torch.dtype, bias: bool, library: str) -> None:
    check(*operands(size, dtype, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout_b", ["row-major", "column-major", "expanded rows", "every second column"])
@pytest.mark.parametrize("layout_a", LAYOUTS)
def test_product_of_any_strides(layout_a: str, layout_b: str, dtype: torch.dtype, library: str) -> None:
    for size in ("large", "one row"):
        a, b, bias = operands(size, dtype)
        check(LAYOUTS[layout_a](a), LAYOUTS[layout_b](b), bias)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_onednn_product_of_any_strides(size: str, layout: str, dtype: torch.dtype) -> None:
    """The op itself also where the table would not call it: with dynamic shapes it meets every size."""
    a, b, bias = operands(size, dtype)
    if a.shape[0] == 0 and layout.startswith(("expanded rows", "all")):
        return  # nothing to expand: covered by the other layouts
    a = LAYOUTS[layout](a)
    result = torch.ops.fuse_pass.gemm(a, b, bias, "none", [], "")
    assert_as_exact_as_eager(result, F.linear(a, b, bias), F.linear(a.double(), b.double(), bias.double()))
    assert result.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_bias_of_any_strides(layout: str, dtype: torch.dtype, library: str) -> None:
    """oneDNN takes a bias for contiguous and would read past its end."""
    a, b, bias = operands("large", dtype)
    assert bias is not None
    check(a, b, torch.stack([bias, -bias], -1).flatten()[::2] if layout == "strided" else bias[:1].expand(len(bias)))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_with_activation(name: str, dtype: torch.dtype, library: str) -> None:
    arguments = {"leaky_relu": (0.2,), "elu": (0.7,), "hardtanh": (-0.5, 0.7), "softplus": (2.0, 3.0)}.get(name, ())
    row, weight = ACTIVATIONS[name], torch.full((1,), 0.3, dtype=dtype)
    for size in ("small", "large", "no row"):
        a, b, bias = operands(size, dtype)
        result = products.product_with_activation(a, b, bias, name, arguments, weight)
        eager = row.forward(F.linear(a, b, bias), arguments, weight)
        exact = row.forward(F.linear(a.double(), b.double(), bias.double()), arguments, weight.double())
        assert_as_exact_as_eager(result, eager, exact, f"{name} {size}")


def test_all_libraries_mean_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    if compat.onednn_linear() is None:
        pytest.skip("this build of PyTorch lacks oneDNN")
    a, b, bias = operands("large", torch.float32)
    results = {}
    for library in (ATEN, ONEDNN):
        prefer(library, monkeypatch)
        results[library] = products.product(a, b, bias)
    exact = F.linear(a.double(), b.double(), bias.double())
    assert_as_exact_as_eager(results[ONEDNN], results[ATEN], exact)
    assert_as_exact_as_eager(results[ATEN], results[ONEDNN], exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_decides_who_computes(dtype: torch.dtype, library: str) -> None:
    """Where the processor lacks the product, on its float32 copy."""
    a, b, bias = operands("large", dtype)
    computed = dtype if compat.has_fast_cpu_dtype(torch.bfloat16) else torch.float32
    by_onednn = library == ONEDNN and onednn.multiplies(computed)
    with Calls() as calls:
        products.product(a, b, bias)
    assert ("fuse_pass::gemm" in calls.names) == by_onednn
    assert ("aten::addmm" in calls.names) == (not by_onednn)


def test_an_activation_joins_the_product_where_onednn_has_it(library: str) -> None:
    a, b, bias = operands("large", torch.float32)
    with Calls() as calls:
        products.product_with_activation(a, b, bias, "gelu", (), None)
    assert ("aten::gelu" in calls.names) == (library == ATEN)
    with Calls() as calls:
        products.product_with_activation(a, b, bias, "mish", (), None)
    assert "aten::mish" in calls.names


def test_small_products_stay_with_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(ONEDNN, monkeypatch)
    with Calls() as calls:
        products.product(*operands("small", torch.float32))
    assert "aten::addmm" in calls.names
    assert "fuse_pass::gemm" not in calls.names


def test_float64_and_unprobed_dtypes_stay_with_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(ONEDNN, monkeypatch)
    with Calls() as calls:
        products.product(*operands("large", torch.float64))
    assert "aten::addmm" in calls.names


@pytest.mark.parametrize("size", ["small", "large"])
def test_float16_is_multiplied_in_float32_without_hardware(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: False)
    a, b, bias = operands(size, torch.float16)
    with Calls() as calls:
        products.product(a, b, bias)
    computed = [d for n, d in zip(calls.names, calls.dtypes, strict=True) if n in ("aten::addmm", "fuse_pass::gemm")]
    assert computed == [torch.float32]
    check(a, b, bias)


def test_float16_stays_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: True)
    with Calls() as calls:
        products.product(*operands("small", torch.float16))
    assert torch.float32 not in calls.dtypes


@pytest.mark.parametrize("rows", [None, 1], ids=["rows", "one row"])
def test_mixed_dtypes_are_refused(library: str, rows: int | None) -> None:
    a, b, bias = operands("large", torch.float32)
    a = a[:rows]
    assert bias is not None
    for mixed in ((a, b.bfloat16(), bias), (a.bfloat16(), b, bias), (a, b, bias.bfloat16())):
        with pytest.raises(RuntimeError, match=r"expected a product of one dtype, got torch\.\w+ and torch\.\w+ with"):
            products.product(*mixed)
        with pytest.raises(RuntimeError, match="expected a product of one dtype"):
            products.product_with_activation(*mixed, "gelu", (), None)


def test_inner_sizes_must_agree(library: str) -> None:
    a, b, bias = operands("large", torch.float32)
    with pytest.raises(RuntimeError):
        products.product(a[:, :-1], b, bias)


def test_rows_of() -> None:
    assert tensors.rows_of(torch.ones(4)).shape == (1, 4)
    assert tensors.rows_of(torch.ones(2, 3, 4)).shape == (6, 4)
    assert tensors.rows_of(torch.ones(2, 0, 4)).shape == (0, 4)
    assert tensors.rows_of(torch.ones(3, 4)).shape == (3, 4)


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_passes_opcheck(transposed: bool) -> None:
    a, b, bias = operands("small", torch.float32)
    a = LAYOUTS["column-major"](a) if transposed else a
    torch.library.opcheck(torch.ops.fuse_pass.gemm.default, (a, b, bias, "gelu", [], "tanh"))


@needs_onednn
def test_unknown_sizes_choose_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    asked: list[tuple[int | None, ...]] = []
    real = products.best
    monkeypatch.setattr(products, "best", lambda problem: asked.append(problem.hints) or real(problem))
    with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()) as mode:
        rows = mode.shape_env.create_unbacked_symint()
        torch._check(rows >= 2)
        products.product(torch.empty(rows, 8), torch.empty(6, 8))
    products.product(torch.ones(3, 8), torch.ones(6, 8))
    assert asked == [(None, 6, 8), (3, 6, 8)]


# --- the op -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who computed each product, in order."""
    found: list[str] = []
    real = products.best

    def noting(problem: GemmProblem) -> Provider:
        provider = real(problem)
        found.append(provider.name)
        return provider

    monkeypatch.setattr(products, "best", noting)
    return found


def ours(values: dict[str, Any]) -> Tensor:
    y: Tensor = torch.ops.fuse_pass.dense(values["x"], values["weight"], values["bias"])
    return y


def by_reference(values: dict[str, Any]) -> Tensor:
    return F.linear(values["x"], values["weight"], values["bias"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", ROWS)
def test_dense_as_exact_as_eager(rank: str, dtype: torch.dtype, bias: bool, library: str) -> None:
    assert_gradients_exact(ours, by_reference, example_inputs(dtype, bias=bias, rows=ROWS[rank]))


def test_dense_of_a_size_that_pays(library: str, chosen: list[str]) -> None:
    assert_gradients_exact(ours, by_reference, example_inputs())
    assert chosen == [library] * 3, "the value and two gradients"


def test_second_gradients_of_dense() -> None:
    tensors = list(example_inputs(torch.float64, rows=(2, 3)).values())
    assert torch.autograd.gradcheck(torch.ops.fuse_pass.dense, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(torch.ops.fuse_pass.dense, tensors, fast_mode=True)


@pytest.mark.parametrize("wanted", [{"x"}, {"weight"}, {"bias"}, {"x", "bias"}])
def test_only_wanted_gradients_are_computed(wanted: set[str], chosen: list[str]) -> None:
    values = {name: value.detach().requires_grad_(name in wanted) for name, value in example_inputs().items()}
    y = ours(values)
    chosen.clear()
    grads = torch.autograd.grad(y.sum(), [value for value in values.values() if value.requires_grad])
    assert len(grads) == len(wanted)
    assert len(chosen) == len(wanted - {"bias"})


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_needs_no_gradient_may_be_written_to_afterwards(frozen: str) -> None:
    """As with F.linear, which keeps only what the gradients need."""
    inputs = example_inputs()

    def gradients(linear: Callable[..., Tensor]) -> list[Tensor]:
        values = {name: value.detach().requires_grad_(name != frozen) for name, value in inputs.items()}
        trained = [value for name, value in values.items() if name != frozen]
        x, weight, bias = (value * 1 for value in values.values())
        y = linear(x, weight, bias)
        (weight if frozen == "x" else x).add_(1)
        return list(torch.autograd.grad(y.sum(), trained))

    torch.testing.assert_close(gradients(torch.ops.fuse_pass.dense), gradients(F.linear))


@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False]])
@pytest.mark.parametrize("transposed", [False, True])
def test_dense_passes_opcheck(transposed: bool, mask: list[bool]) -> None:
    values = example_inputs(rows=(2, 3))
    if transposed:
        values["weight"] = LAYOUTS["column-major"](values["weight"].detach()).requires_grad_()
    torch.library.opcheck(torch.ops.fuse_pass.dense.default, tuple(values.values()))
    x, weight, bias = (value.detach() for value in values.values())
    torch.library.opcheck(torch.ops.fuse_pass.dense_act.default, (x, weight, bias, "leaky_relu", [0.2]))
    need_x, need_weight, _ = mask
    given = (x if need_weight else None, weight if need_x else None)
    arguments = (torch.ones(2, 3, 112), *given, transposed, mask)
    torch.library.opcheck(torch.ops.fuse_pass.dense_backward.default, arguments)


def test_autocast_casts_like_a_linear() -> None:
    values = example_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(values).dtype is torch.bfloat16
        plain = torch.ops.fuse_pass.dense_act(*(v.detach() for v in values.values()), "relu", [])
        assert plain.dtype is torch.bfloat16
        result, expected = run(ours, values), run(by_reference, values)
    for name, value in result.items():
        assert value.dtype is expected[name].dtype
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-2)


def test_the_gradient_has_the_layout_of_the_weight() -> None:
    grad, x = torch.randn(5, 6), torch.randn(5, 8)
    for weight in (torch.empty(6, 8), torch.empty(8, 6).t(), torch.empty(6, 1), torch.empty(1, 8).t()):
        x_here, grad_here = x[:, : weight.shape[1]], grad[:, :1].expand(5, weight.shape[0])
        gradient = products.weight_gradient(grad_here, x_here, weight)
        assert gradient.stride() == weight.stride() == gradient_like(weight).stride()
        torch.testing.assert_close(gradient, grad_here.t() @ x_here)
