"""NaN and infinities among the values that share a scale: the whole group is NaN, and no other group changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse_pass import absmax_quantize, convert, fake_quantize, formats
from fuse_pass.nn import BitLinear, FusedDenseGELUDense
from fuse_pass.numerics.formats import (
    BlockFormat,
    FixedFormat,
    FloatFormat,
    Format,
    Granularity,
    IntFormat,
)
from fuse_pass.numerics.rounding import ROUNDINGS
from fuse_pass.numerics.spec import QuantSpec, Site

BLOCKS = sorted({fmt for fmt in formats.values() if isinstance(fmt, BlockFormat)}, key=lambda fmt: fmt.name)
BLOCKS.append(BlockFormat(FixedFormat(2, 5), 4, FloatFormat(5, 0, encoding="scale")))
SCALED = ("int8", "int4", "int8_asymmetric", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1")
GROUPS = (Granularity("token"), Granularity("group", size=16), Granularity("channel", axis=0))
values = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


def quantize_scaled(x: Tensor, fmt: str, granularity: Granularity, **options: Any) -> Tensor:
    scale = "absmax" if isinstance(formats[fmt], FloatFormat) else None
    return fake_quantize(x, fmt, granularity=granularity, scale=scale, **options)


def assert_only_its_group_is_lost(quantize: Callable[[Tensor], Tensor], size: int, value: float, **like: Any) -> None:
    """Rows of 70: groups of `size`, the last one shorter."""
    x = (torch.randn(3, 70, dtype=torch.float64) * 4).to(**like)
    x[1, 0] = 0
    spoilt = x.clone()
    places = {(1, size // 2), (2, 69)}
    for row, column in places:
        spoilt[row, column] = value
    spoilt.requires_grad_()
    y, expected = quantize(spoilt), quantize(x)
    lost = torch.zeros_like(x, dtype=torch.bool)
    for row, column in places:
        lost[row, column // size * size : column // size * size + size] = True
    assert y[lost].isnan().all()
    assert torch.equal(y[~lost], expected[~lost]), "nothing else changes"
    assert y.dtype is x.dtype
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(spoilt.grad, grad), "straight through, also to what is lost"


@values
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fmt", BLOCKS, ids=lambda fmt: fmt.name)
def test_blocks(fmt: BlockFormat, dtype: torch.dtype, value: float) -> None:
    assert_only_its_group_is_lost(lambda x: fake_quantize(x, fmt), fmt.block_size, value, dtype=dtype)


@values
@pytest.mark.parametrize("mode", ROUNDINGS)
def test_blocks_in_every_mode(mode: str, value: float) -> None:
    """The stochastic ones, too; each element is rounded as without the infinity elsewhere."""
    for name in ("mxfp4", "mxint8"):
        assert_only_its_group_is_lost(
            lambda x, name=name: fake_quantize(x, name, rounding=mode, seed=7), 32, value, dtype=torch.float32
        )


@values
@pytest.mark.parametrize("granularity", GROUPS, ids=lambda granularity: granularity.kind)
@pytest.mark.parametrize("fmt", SCALED)
@pytest.mark.parametrize("mode", ["nearest", "plus_inf", "stoc_prop"])
def test_scales_of_the_tensor(fmt: str, granularity: Granularity, mode: str, value: float) -> None:
    def quantize(x: Tensor) -> Tensor:
        return quantize_scaled(x, fmt, granularity, rounding=mode, seed=7)

    assert_only_its_group_is_lost(quantize, granularity.size or 70, value, dtype=torch.float32)


@values
def test_one_scale_for_all(value: float) -> None:
    x = torch.tensor([[0.5, value], [1.0, 2.0]])
    for fmt in SCALED:
        assert quantize_scaled(x, fmt, Granularity("tensor")).isnan().all(), fmt


def test_elements_that_share_nothing_stand_for_themselves() -> None:
    x = torch.tensor([0.25, math.nan, math.inf, -math.inf, 1.0])
    expected: dict[Any, list[float]] = {
        "fp8_e5m2": [0.25, math.nan, math.inf, -math.inf, 1],
        "fp8_e4m3": [0.25, math.nan, 448, -448, 1],
        "fixed3_4": [0.25, math.nan, 7.9375, -8, 1],
    }
    for name, wanted in expected.items():
        torch.testing.assert_close(fake_quantize(x, name), torch.tensor(wanted), equal_nan=True, rtol=0, atol=0)
    given = fake_quantize(x, "int8", scale=torch.tensor(0.25))
    torch.testing.assert_close(given, torch.tensor([0.25, math.nan, 31.75, -31.75, 1]), equal_nan=True, rtol=0, atol=0)


def test_finite_numbers_never_give_nan() -> None:
    """The largest numbers of each dtype, also those beyond what a scale can express."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        ends = torch.tensor([info.max, -info.max, info.tiny, info.smallest_normal, 0.0, -0.0, 1.0, 3.0], dtype=dtype)
        for x in (ends, ends[2:], ends[2:4], ends[4:6]):
            for fmt in BLOCKS:
                assert not fake_quantize(x, fmt).isnan().any(), (fmt.name, dtype)


def test_compiled() -> None:
    """The same bits through Inductor, blocks and groups, in forward and backward."""
    x = torch.randn(4, 64)
    x[1, 40], x[3, 0] = math.nan, -math.inf

    def everything(x: Tensor) -> list[Tensor]:
        blocks: list[Format | str] = ["mxfp8", "mxfp4", "mxint8", "bfp"]
        found = [fake_quantize(x, fmt) for fmt in blocks]
        found.append(fake_quantize(x, "mxfp8", rounding="stoc_prop", seed=3))
        return found + [quantize_scaled(x, fmt, GROUPS[0]) for fmt in ("int8", "int8_asymmetric", "fp8_e4m3")]

    results = []
    for call in (everything, torch.compile(everything, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        outputs = call(leaf)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        results.append([y.detach() for y in outputs] + [leaf.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)
    assert all(y[[1, 3]].isnan().any() and not y[[0, 2]].isnan().any() for y in results[1][:-1])


@values
def test_layers_lose_the_row_and_no_other(value: float) -> None:
    """A scale per token: converted layers, BitNet b1.58 and LLM.int8 without outliers."""
    per_token = QuantSpec(input=Site(IntFormat(8), granularity=Granularity("token")))
    layers = {
        "convert": convert(nn.Linear(8, 4), per_token),
        "MX": convert(nn.Linear(8, 4), "mxfp8"),
        "b1.58": BitLinear(8, 4, variant="b1.58"),
        "LLM.int8": FusedDenseGELUDense(8, 4, threshold=0.0).quantize_(),
    }
    x = torch.randn(3, 8)
    spoilt = x.clone()
    spoilt[1, 3] = value
    for name, layer in layers.items():
        y, expected = layer(spoilt), layer(x)
        assert y[1].isnan().all(), name
        assert torch.equal(y[[0, 2]], expected[[0, 2]]), name


@values
def test_absmax_quantize_says_so(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        absmax_quantize(torch.tensor([1.0, value]))
