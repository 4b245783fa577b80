"""Products by oneDNN: operands stored in any way and never written to, and processors that have no such product."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fuse_pass.gemm import onednn
from fuse_pass.inductor import compat
from tests.precision import assert_as_exact_as_eager, assert_sums_as_exact_as_one_by_one

pytestmark = [
    pytest.mark.processor,
    pytest.mark.skipif(compat.onednn_linear() is None, reason="this build of PyTorch lacks oneDNN"),
]
NO_PRIMITIVE = "could not create a primitive descriptor for the inner product forward propagation primitive"


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """The dtypes in which a product has failed: none yet."""
    found: set[torch.dtype] = set()
    monkeypatch.setattr(onednn, "_failed", found)
    return found


def by_columns(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


def result_of(a: Tensor, b: Tensor, bias: Tensor | None = None, attribute: str = "none") -> Tensor:
    before = a.clone(), b.clone()
    result = onednn.product(a, b, bias, attribute, [], "")
    assert result.is_contiguous()
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
    return result


def assert_exact(a: Tensor, b: Tensor, bias: Tensor | None = None, attribute: str = "none") -> None:
    eager, exact = (
        t.relu() if attribute == "relu" else t
        for t in (torch.nn.functional.linear(x, y, z) for x, y, z in ((a, b, bias), wide(a, b, bias)))
    )
    assert_as_exact_as_eager(result_of(a, b, bias, attribute), eager, exact)


def wide(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return a.double(), b.double(), None if bias is None else bias.double()


@pytest.mark.parametrize("rows", [3072, 4096, 5001])
def test_sum_over_many_rows(rows: int) -> None:
    """The gradient of a weight, in blocks. Some processors' float32 sums err three times as much in one call."""
    grad, x = torch.randn(rows, 37), torch.randn(rows, 50)
    assert_sums_as_exact_as_one_by_one(result_of(grad.t(), x.t()), grad.t(), x.t(), block=onednn._BLOCK)


def test_the_bound_is_sharp() -> None:
    """It passes sums that are added one by one, and neither such as are not cut into blocks nor one wrong product."""
    a, b = torch.randn(12, 5001), torch.randn(16, 5001)
    products = (a[:, None, :] * b).numpy()
    by_one = torch.from_numpy(products.cumsum(-1, dtype="float32")[..., -1].copy())
    assert_sums_as_exact_as_one_by_one(by_one, a, b)
    with pytest.raises(AssertionError, match="allowed"):
        assert_sums_as_exact_as_one_by_one(by_one, a, b, block=onednn._BLOCK)
    by_one[3, 5] += 0.01
    with pytest.raises(AssertionError, match="allowed"):
        assert_sums_as_exact_as_one_by_one(by_one, a, b)


@pytest.mark.parametrize("rows", [3072, 5001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_where_this_processor_has_them(dtype: torch.dtype, rows: int) -> None:
    grad, x = torch.randn(rows, 37).to(dtype), torch.randn(rows, 50).to(dtype)
    if onednn.multiplies(dtype):
        assert_exact(grad.t(), x.t())
    else:
        with pytest.raises(onednn.NoPrimitiveError, match=str(dtype).removeprefix("torch.")):
            onednn.product(grad.t(), x.t(), None, "none", [], "")


def test_blocks_are_added_up_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of small integers are exact, in whatever order."""
    calls: list[int] = []
    add = compat.onednn_linear_add()
    monkeypatch.setattr(
        compat, "onednn_linear_add", lambda: lambda a, *rest: (calls.append(a.shape[1]), add(a, *rest))[1]
    )
    grad, x = (torch.randint(-4, 5, (4100, width)).float() for width in (16, 24))
    assert torch.equal(onednn.product(grad.t(), x.t(), None, "none", [], ""), grad.t() @ x)
    assert calls == [1025, 1025, 1025]
    calls.clear()
    onednn.product(grad[:3071].t(), x[:3071].t(), None, "none", [], "")
    if onednn.multiplies(torch.bfloat16):
        onednn.product(grad.t().bfloat16(), x.t().bfloat16(), None, "none", [], "")
    assert calls == [], "for a short sum, or one that is rounded to bfloat16 in between"


@pytest.mark.parametrize("rows", [3071, 3072])
@pytest.mark.parametrize("attribute", ["none", "relu"])
def test_weight_stored_by_columns(rows: int, attribute: str) -> None:
    x, weight, bias = torch.randn(rows, 50), by_columns(torch.randn(37, 50)), torch.randn(37)
    assert_exact(x, weight)
    assert_exact(x, weight, bias, attribute)


@pytest.mark.parametrize(("has_bias", "attribute"), [(True, "none"), (True, "relu"), (False, "relu")])
def test_both_stored_by_columns_with_a_bias_or_an_activation(has_bias: bool, attribute: str) -> None:
    """Only plain products may be cut: a bias would be added, and an activation applied, once per block."""
    grad, x, bias = torch.randn(4096, 37), torch.randn(4096, 50), torch.randn(50) if has_bias else None
    result = result_of(grad.t(), x.t(), bias, attribute)
    assert_sums_as_exact_as_one_by_one(result, grad.t(), x.t(), bias, relu=attribute == "relu")


def test_one_column() -> None:
    for columns in ((1, 8), (8, 1)):
        a, b = (torch.randn(4096, width).t() for width in columns)
        assert_sums_as_exact_as_one_by_one(result_of(a, b), a, b, block=onednn._BLOCK)


def refusing(message: str, dtype: torch.dtype, asked: list[torch.dtype]) -> Callable[..., Any]:
    """oneDNN's product on a processor that has none in this dtype, and does not say so before."""
    real = compat.onednn_linear()
    assert real is not None

    def linear(a: Tensor, *rest: Any) -> Tensor:
        asked.append(a.dtype)
        if a.dtype is dtype:
            raise RuntimeError(message)
        return real(a, *rest)

    return linear


def test_a_product_that_does_not_exist_is_not_tried_again(
    failed: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []
    linear = refusing(NO_PRIMITIVE, torch.bfloat16, asked)
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: True)
    monkeypatch.setattr(compat, "onednn_linear", lambda: linear)
    a, b = torch.randn(3, 8), torch.randn(6, 8)
    assert onednn.multiplies(torch.bfloat16)
    for _ in range(3):
        with pytest.raises(onednn.NoPrimitiveError, match="no product in bfloat16 on this processor"):
            onednn.product(a.bfloat16(), b.bfloat16(), None, "none", [], "")
    assert asked == [torch.bfloat16]
    assert not onednn.multiplies(torch.bfloat16)
    assert onednn.multiplies(torch.float32), "of which nothing was heard"
    torch.testing.assert_close(onednn.product(a, b, None, "none", [], ""), a @ b.t())


def test_other_errors_say_nothing_about_the_processor(
    failed: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = refusing("mkldnn_linear: input and weight need the same inner size", torch.float32, [])
    monkeypatch.setattr(compat, "onednn_linear", lambda: linear)
    with pytest.raises(RuntimeError, match="same inner size") as raised:
        onednn.product(torch.randn(3, 8), torch.randn(6, 8), None, "none", [], "")
    assert raised.type is RuntimeError
    assert failed == set()


def test_operands_that_do_not_fit_say_nothing_about_the_processor(failed: set[torch.dtype]) -> None:
    """oneDNN's words for these are the same."""
    a, b, bias = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6)
    for operands in ((a[:, 1:], b, bias), (a, b, bias[1:])):
        with pytest.raises(RuntimeError) as raised:
            onednn.product(*operands, "none", [], "")
        assert raised.type is RuntimeError
    with contextlib.suppress(RuntimeError):  # which the oneDNN of torch 2.15 does not raise: it multiplies two dtypes
        y = onednn.product(a, b.bfloat16(), bias, "none", [], "")
        torch.testing.assert_close(y, torch.addmm(bias, a, b.bfloat16().float().t()))
    assert failed == set()


def test_packing_is_asked_for_as_well(failed: set[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has words of its own where it does not let oneDNN try."""

    def pack(weight: Tensor, rows: int) -> Tensor:
        raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw")

    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: True)
    monkeypatch.setattr(compat, "pack_onednn_weight", pack)
    with pytest.raises(onednn.NoPrimitiveError):
        onednn.pack(torch.randn(6, 8).bfloat16(), 512)
    assert failed == {torch.bfloat16}


def test_only_what_onednn_multiplies_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float64, torch.int8, torch.complex64):
        assert not onednn.multiplies(dtype)
    for has in (True, False):
        monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype, has=has: dtype is torch.bfloat16 and has)
        assert onednn.multiplies(torch.bfloat16) == has
        assert not onednn.multiplies(torch.float16)
        assert onednn.multiplies(torch.float32)
    monkeypatch.setattr(compat, "onednn_linear", lambda: None)
    assert not onednn.multiplies(torch.float32)
    with pytest.raises(onednn.NoPrimitiveError, match="in this build of PyTorch"):
        onednn.product(torch.randn(3, 8), torch.randn(6, 8), None, "none", [], "")


def test_what_a_measurement_takes_for_granted(failed: set[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {onednn.abilities()}
    for name in onednn._VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(name, "another value")
            found.add(onednn.abilities())
    failed.add(torch.float32)
    found.add(onednn.abilities())
    assert len(found) == len(onednn._VARIABLES) + 2
    assert all(compat.onednn_version() in text for text in found)
