"""dropout_norm with a quantised sum: the bits of the unfused computation, gradients straight through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fuse_pass.ops.packed_format import straight_through_packed
from fuse_pass.patterns import spellings
from tests.packed import packed_format

example_inputs = spellings.dropout_norm.CORPUS.example_inputs

ops = torch.ops.fuse_pass
FORMATS = {
    "fp8_e4m3": packed_format(4, 3, 7, "fn", "nearest", True, "ieee"),
    "fp4_e2m1, towards zero": packed_format(2, 1, 1, "finite", "towards_zero", True, "saturate"),
    "bf16": packed_format(8, 7, 127, "ieee", "nearest", True, "ieee"),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_case = pytest.mark.parametrize(
    ("norm", "p", "dtype", "name"),
    [
        (norm, p, dtype, name)
        for norm in ("layer_norm", "rms_norm")
        for p in (0.0, 0.25)
        for dtype in DTYPES
        for name in FORMATS
    ],
)


def arguments(norm: str, p: float, dtype: torch.dtype) -> tuple[list[Any], tuple[Any, ...]]:
    torch.manual_seed(0)
    values = list(example_inputs(dtype).values())
    if norm == "rms_norm":
        values[3] = None
    return values, (torch.tensor(77) if p else None, p, 1e-5, 1, norm, None, False)


def fused(values: list[Any], settings: tuple[Any, ...], sum_format: list[int]) -> tuple[Tensor, Tensor]:
    return ops.dropout_norm(*values, *settings, sum_format)[:2]  # type: ignore[no-any-return]


def unfused(values: list[Any], settings: tuple[Any, ...], sum_format: list[int]) -> tuple[Tensor, Tensor]:
    """The sum by the op itself, quantised by another op, normalised by a third."""
    _, _, *constants, norm_dtype, first = settings
    z = ops.dropout_norm(values[0], values[1], None, None, *settings)[1]
    seen = straight_through_packed(z, sum_format)
    return ops.dropout_norm(seen, None, *values[2:], None, 0.0, *constants, norm_dtype, first)[0], z


def gradients(results: tuple[Tensor, Tensor], values: list[Any]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    leaves = [value for value in values if value is not None]
    return torch.autograd.grad(results, leaves, [torch.randn_like(result) for result in results])


@every_case
def test_the_bits_of_the_unfused_computation(norm: str, p: float, dtype: torch.dtype, name: str) -> None:
    values, settings = arguments(norm, p, dtype)
    ours, theirs = fused(values, settings, FORMATS[name]), unfused(values, settings, FORMATS[name])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(ours, values), gradients(theirs, values), strict=True):
        assert torch.equal(a, b)


def test_the_sum_itself_is_not_quantized_and_the_norm_reads_a_quantized_one() -> None:
    values, settings = arguments("layer_norm", 0.0, torch.float32)
    y, z = fused(values, settings, FORMATS["fp4_e2m1, towards zero"])
    assert torch.equal(z, values[0] + values[1])
    assert not torch.allclose(y, fused(values, settings, [])[0], atol=0.1)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_second_gradients(norm: str) -> None:
    values, settings = arguments(norm, 0.25, torch.float64)
    leaves = [value for value in values if value is not None]

    def twice(function: Any) -> tuple[Tensor, ...]:
        y = function(values, settings, FORMATS["fp8_e4m3"])[0]
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for a, b in zip(twice(fused), twice(unfused), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_opcheck(norm: str) -> None:
    values, settings = arguments(norm, 0.25, torch.float32)
    torch.library.opcheck(ops.dropout_norm.default, (*values, *settings, FORMATS["fp8_e4m3"]))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_compiled(p: float) -> None:
    """The quantisation is a matter of bits: only rounding of the sums may differ between eager and compiled."""
    values, settings = arguments("layer_norm", p, torch.float32)
    compiled = torch.compile(fused)
    ours, eager = compiled(values, settings, FORMATS["fp8_e4m3"]), fused(values, settings, FORMATS["fp8_e4m3"])
    torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(ours, values), gradients(eager, values), rtol=1e-5, atol=1e-5)
