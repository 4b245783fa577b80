"""Large float32 products: the same numbers however the operands are stored, and operands that nobody has written to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fuse_pass.inductor import compat, onednn
from tests.precision import assert_as_exact_as_eager

pytestmark = pytest.mark.skipif(compat.onednn_linear() is None, reason="this build of PyTorch lacks oneDNN")


def by_columns(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


def assert_exact(a: Tensor, b: Tensor, bias: Tensor | None = None, attribute: str = "none") -> None:
    before = a.clone(), b.clone()
    result = onednn.product(a, b, bias, attribute, [], "")
    eager, exact = (
        t.relu() if attribute == "relu" else t
        for t in (torch.nn.functional.linear(x, y, z) for x, y, z in ((a, b, bias), wide(a, b, bias)))
    )
    assert_as_exact_as_eager(result, eager, exact)
    assert result.is_contiguous()
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def wide(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return a.double(), b.double(), None if bias is None else bias.double()


@pytest.mark.parametrize("rows", [3072, 4096, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_over_many_rows(rows: int, dtype: torch.dtype) -> None:
    """The gradient of a weight. In one call oneDNN's float32 sums err three times as much as eager's; blocks do not."""
    if dtype is torch.bfloat16 and not compat.has_fast_cpu_dtype(dtype):
        pytest.skip("bfloat16 is slow here")
    grad, x = torch.randn(rows, 37).to(dtype), torch.randn(rows, 50).to(dtype)
    assert_exact(grad.t(), x.t())


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
    onednn.product(grad.t().bfloat16(), x.t().bfloat16(), None, "none", [], "")
    assert calls == [], "for a short sum, or one that is rounded to bfloat16 in between"


@pytest.mark.parametrize("rows", [3071, 3072])
@pytest.mark.parametrize("attribute", ["none", "relu"])
def test_weight_stored_by_columns(rows: int, attribute: str) -> None:
    x, weight, bias = torch.randn(rows, 50), by_columns(torch.randn(37, 50)), torch.randn(37)
    assert_exact(x, weight)
    assert_exact(x, weight, bias, attribute)


def test_both_stored_by_columns_with_a_bias_and_an_activation() -> None:
    """Only plain products may be cut: a bias would be added, and an activation applied, once per block."""
    grad, x, bias = torch.randn(4096, 37), torch.randn(4096, 50), torch.randn(50)
    assert_exact(grad.t(), x.t(), bias)
    assert_exact(grad.t(), x.t(), bias, "relu")
    assert_exact(grad.t(), x.t(), None, "relu")


def test_one_column() -> None:
    assert_exact(torch.randn(4096, 1).t(), torch.randn(4096, 8).t())
    assert_exact(torch.randn(4096, 8).t(), torch.randn(4096, 1).t())
