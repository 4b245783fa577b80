"""Matrix products on another processor than this one, or with another PyTorch: the answers of either are forced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fuse_pass.ops  # noqa: F401 - registers the ops
from fuse_pass.gemm import onednn
from fuse_pass.gemm import product as products
from fuse_pass.gemm.problem import GemmProblem
from fuse_pass.gemm.providers import best
from fuse_pass.inductor import compat
from fuse_pass.numerics.activations import ACTIVATIONS
from tests.ops.test_dense import ONEDNN, SIZES, Calls, check, needs_onednn, operands, prefer
from tests.precision import assert_as_exact_as_eager

pytestmark = pytest.mark.processor


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product has failed yet, and no warning was given."""
    monkeypatch.setattr(onednn, "_failed", set())
    products._say_once.cache_clear()


@needs_onednn
@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_on_processors_with_and_without_it(
    has: bool, nothing_said: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either answer on any processor; where oneDNN cannot multiply bfloat16, float32 stands in for it."""
    prefer(ONEDNN, monkeypatch)
    if has and not onednn.multiplies(torch.bfloat16):
        monkeypatch.setattr(compat, "onednn_linear", lambda: lambda a, b, bias, *post_op: F.linear(a, b, bias))
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype: has)
    a, b, bias = operands("large", torch.bfloat16)
    with Calls() as calls:
        check(a, b, bias)
    assert ("fuse_pass::gemm" in calls.names and torch.float32 not in calls.dtypes) == has
    for name in ("gelu", "mish"):
        with Calls() as calls:
            products.product_with_activation(a, b, bias, name, (), None)
        assert ("fuse_pass::gemm" in calls.names and torch.float32 not in calls.dtypes) == has
    assert products.pays(GemmProblem(a.device, a.dtype, SIZES["large"]))


GEMMS = (torch.ops.fuse_pass.gemm.default, torch.ops.fuse_pass.gemm_prepacked.default)
SLOPE = [0.2]
POST_OPS = {name: row.post_op for name, row in ACTIVATIONS.items() if row.post_op is not None}


@pytest.mark.parametrize("cause", ["known", "found out", "no oneDNN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_call_compiled_on_another_machine_computes_by_aten(
    dtype: torch.dtype, cause: str, nothing_said: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Tensor:
        raise RuntimeError("could not create a primitive descriptor for the inner product")

    if cause == "known":
        onednn._failed.add(dtype)
    monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda asked: asked is dtype)
    monkeypatch.setattr(compat, "onednn_linear", lambda: None if cause == "no oneDNN" else fail)
    a, b, bias = operands("small", dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(RuntimeWarning, match=f"no product in {name}") as warned:
        results = {(op, act): call(op, act, a, b, bias) for op in GEMMS * 2 for act in ("", *POST_OPS)}
    assert len(warned) == 1
    for (op, act), result in results.items():
        forward = ACTIVATIONS[act].forward if act else lambda h, *_: h
        eager = forward(F.linear(a, b, bias), SLOPE, None)
        exact = forward(F.linear(a.double(), b.double(), bias.double()), SLOPE, None)
        assert_as_exact_as_eager(result, eager, exact, f"{op} {act}")
    assert best(GemmProblem(a.device, dtype)).name != ONEDNN
    with pytest.raises(onednn.NoPrimitiveError):
        torch.ops.fuse_pass.gemm(a, b, bias, "an activation that is none of ours", [], "")


def call(op: Callable[..., Tensor], act: str, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    attribute, algorithm = POST_OPS[act] if act else ("none", "")
    return op(a, b, bias, attribute, SLOPE if act == "leaky_relu" else [], algorithm)
