"""Products with one to four rows, which Inductor generates as sums: the right numbers, and only where they pay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from fuse_pass import FuseBackend, fuse_backend
from fuse_pass.gemm import measured
from fuse_pass.gemm.probe import Kind
from fuse_pass.gemm.problem import GemmProblem
from fuse_pass.gemm.product import packing_pays, product
from fuse_pass.gemm.providers import Sums, best
from fuse_pass.inductor import compat
from tests.precision import assert_as_exact_as_eager

DIM, HIDDEN = 136, 200  # no multiples of a vector
CPU = torch.device("cpu")
needs_vectors = pytest.mark.skipif(not compat.has_vector_loops(), reason="Inductor knows no vectors of this CPU")


def block(dtype: torch.dtype = torch.float32, *, column_major: bool = False) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM, bias=False), nn.Linear(DIM, 5))
    for layer in model:
        if column_major and isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.t().contiguous().t()
    return model.to(dtype)


def infer(model: nn.Module, x: Tensor, **settings: Any) -> tuple[Tensor, str]:
    with torch.no_grad():
        y, (code,) = run_and_get_code(torch.compile(model, backend=fuse_backend, **settings), x)
    return y, code


def products_called(code: str) -> int:
    return sum("fuse_pass.gemm" in line or ("extern_kernels" in line and "mm(" in line) for line in code.splitlines())


@needs_vectors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(DIM,), (1, DIM), (1, 1, DIM), (2, DIM), (1, 2, DIM)], ids=str)
def test_are_sums_and_as_exact_as_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model, x = block(dtype), torch.randn(shape).to(dtype)
    y, code = infer(model, x)
    assert_as_exact_as_eager(y, model(x), copy.deepcopy(model).double()(x.double()))
    # Two rows do not pay in the last layer, which is small.
    assert products_called(code) == (0 if x.numel() == DIM else 1)


@pytest.mark.parametrize("make", [
    lambda: (block(), torch.randn(4, DIM)[::2]),
    lambda: (block(), torch.randn(2, DIM, 3)[..., 1]),
    lambda: (block(), torch.randn(1, DIM).expand(2, DIM)),
    lambda: (block(), torch.randn(3, 7, DIM)[:, -1]),
    lambda: (block(column_major=True), torch.randn(1, DIM)),
    lambda: (block(torch.bfloat16, column_major=True), torch.randn(1, DIM).bfloat16()),
])  # fmt: skip
def test_strides(make: Any) -> None:
    model, x = make()
    y, _ = infer(model, x)
    assert_as_exact_as_eager(y, model(x), copy.deepcopy(model).double()(x.double()))


@pytest.mark.parametrize("features", [(DIM, 0), (0, DIM)], ids=str)
def test_no_features(features: tuple[int, int]) -> None:
    d_in, d_out = features
    weight, bias, x = torch.randn(d_out, d_in), torch.randn(d_out), torch.randn(1, d_in)
    with torch.no_grad():
        y = torch.compile(F.linear, backend=fuse_backend)(x, weight, bias)
    assert torch.equal(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_special_values_pass_through(special: float) -> None:
    model, x = block(), torch.randn(2, DIM)
    x[1, 3] = special
    y, _ = infer(model, x)
    assert torch.equal(y.isnan(), model(x).isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_gradients(rows: int, dtype: torch.dtype) -> None:
    def gradients(call: Any, module: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        return list(torch.autograd.grad(call(x).float().square().sum(), [x, *module.parameters()]))

    model, x = block(dtype), torch.randn(rows, DIM).to(dtype)
    ours = gradients(torch.compile(model, backend=fuse_backend), model, x)
    wide = copy.deepcopy(model).double()
    for name, *values in zip(
        ["x", *dict(model.named_parameters())], ours, gradients(model, model, x), gradients(wide, wide, x.double()),
        strict=True,
    ):  # fmt: skip
        assert_as_exact_as_eager(*values, str(name))


def test_a_number_of_rows_that_varies_is_one_product() -> None:
    model, few, many = block(), torch.randn(2, DIM), torch.randn(9, DIM)
    torch._dynamo.mark_dynamic(few, 0)
    with torch.no_grad():
        compiled = torch.compile(model, backend=fuse_backend)
        _, (code,) = run_and_get_code(compiled, few)
        assert products_called(code) == 3
        for x in (few, many):
            assert_as_exact_as_eager(compiled(x), model(x), copy.deepcopy(model).double()(x.double()))


class Called(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_outside_a_graph_a_library_multiplies() -> None:
    x, weight = torch.randn(1, DIM), torch.randn(HIDDEN, DIM)
    with Called() as called:
        y = product(x, weight)
    assert "mm" in called.names
    torch.testing.assert_close(y, F.linear(x, weight))


@needs_vectors
@pytest.mark.parametrize(
    ("pays", "sizes", "dtype", "column_major"),
    [
        (True, (1, 768, 3072), torch.float32, False),
        (True, (1, 768, 3072), torch.bfloat16, False),
        (True, (1, 768, 3072), torch.float16, False),
        (True, (1, 768, 3072), torch.bfloat16, True),
        (True, (4, 768, 3072), torch.float32, False),
        (True, (2, 768, 3072), torch.bfloat16, False),
        (True, (1, 17, 1), torch.float32, False),
        (False, (0, 768, 3072), torch.float32, False),
        (False, (5, 768, 3072), torch.float32, False),
        (False, (3, 768, 3072), torch.bfloat16, False),
        (False, (1, 768, 3072), torch.float32, True),
        (False, (1, 768, 3072), torch.float64, False),
        (False, (1, 16, 16), torch.float32, False),
        (False, (1, 1, 3072), torch.float32, False),
        (False, (2, 32, 32), torch.float32, False),
    ],
)
def test_where_they_pay(pays: bool, sizes: tuple[int, int, int], dtype: torch.dtype, column_major: bool) -> None:
    assert are_sums(GemmProblem(CPU, dtype, sizes, column_major=column_major)) is pays


def are_sums(problem: GemmProblem) -> bool:
    return isinstance(best(problem), Sums)


def test_where_they_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (1, 768, 3072)
    assert not are_sums(GemmProblem(torch.device("cuda"), torch.float32, sizes))
    assert not are_sums(GemmProblem(CPU, torch.float32, sizes, in_graph=False)), "run one by one, they are all stored"
    assert not are_sums(GemmProblem(CPU, torch.float32, sizes, is_dense=False))
    monkeypatch.setattr(compat, "has_vector_loops", lambda: False)
    assert not are_sums(GemmProblem(CPU, torch.float32, sizes))


@pytest.mark.parametrize("memory", ["fastest", "balanced", "smallest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_leaves_the_input_as_it_was(dtype: torch.dtype, memory: str) -> None:
    """Kept for backward as a value of its own, what is stored once would be memory that backward may write to."""
    model, x = block(dtype), torch.randn(2, DIM).to(dtype).requires_grad_()
    before = [tensor.detach().clone() for tensor in (x, *model.parameters())]
    torch.compile(model, backend=FuseBackend(memory=memory))(x).float().square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((x, *model.parameters()), before, strict=True))


@needs_vectors
def test_a_single_row_needs_no_packed_weights() -> None:
    weight = torch.empty(1024, 1024)
    assert not packing_pays(weight, 1)
    assert packing_pays(weight, 2) == (measured.name(torch.float32, Kind.PACKED_FEW_ROWS) in measured.table())
