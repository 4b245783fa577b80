"""The public functions: formats by name, scales, blocks, seeds, compilation, bad input."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fuse_pass.numerics import rounding as core
from fuse_pass.numerics.formats import (
    BlockFormat,
    FixedFormat,
    FloatFormat,
    Granularity,
    IntFormat,
    formats,
)
from fuse_pass.ops.fake_quantize_int import round_to_multiples
from fuse_pass.quantization.functional import FloatPrecisionSimulator, absmax_quantize, fake_quantize
from tests.numerics.test_rounding import same_bits
from tests.oracle import DETERMINISTIC, Table, exact_round

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GRANULARITIES = [
    Granularity(),
    Granularity("token"),
    Granularity("channel"),
    Granularity("channel", axis=-2),
    Granularity("group", size=4),
    Granularity("group", size=5),
]


def fake_quantize_rows(x: Tensor, names: list[str], rounding: str = "nearest") -> list[Tensor]:
    return [fake_quantize(x, name, rounding=rounding, seed=5) for name in names]


# --- any format -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in formats if name != "e8m0"])
def test_every_format_by_name(name: str) -> None:
    """Shape, dtype, memory layout, zeros, empty and 0-d tensors, idempotence, straight-through gradients."""
    x = (torch.randn(3, 4, 10).transpose(1, 2) * 3).requires_grad_()
    y = fake_quantize(x, name)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert same_bits(y, fake_quantize(x.contiguous(), name))
    if not isinstance(formats[name], IntFormat):  # of integers the scale may move by an ulp
        assert same_bits(fake_quantize(y, name), y)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 0.7))
    assert torch.equal(grad, torch.full_like(x, 0.7))
    for shape in ((), (0,), (2, 0), (1,)):
        assert torch.equal(fake_quantize(torch.zeros(shape), name), torch.zeros(shape))
    assert math.isnan(fake_quantize(torch.tensor(math.nan), name).item())


@pytest.mark.parametrize("name", ["tf32", "fp8_e4m3", "fp4_e2m1", "int8", "int4_asymmetric", "fixed7_8", "mxfp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_own(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 40, dtype=torch.float64).to(dtype)
    y = fake_quantize(x, name)
    assert y.dtype is dtype
    if dtype in (torch.float16, torch.bfloat16):
        assert same_bits(y, fake_quantize(x.float(), name).to(dtype))


@pytest.mark.parametrize("name", ["fp8_e5m2", "int8", "fixed7_8", "mxint8", "mxfp8"])
def test_float64_is_not_narrowed(name: str) -> None:
    """1 + 2^-40 is 1 in float32, and rounds up only where all of its bits are seen."""
    x = torch.tensor([1 + 2.0**-40, 127.0], dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64) if name == "int8" else None
    y = fake_quantize(x, name, rounding="plus_inf", scale=scale)
    assert y.dtype is torch.float64
    assert y[0] > 1


def test_overflow_defaults() -> None:
    x = torch.tensor([1e9, -1e9, math.inf])
    assert fake_quantize(x, "fp16").tolist() == [math.inf, -math.inf, math.inf]
    assert fake_quantize(x, "fp8_e4m3").tolist() == [448, -448, 448]
    assert fake_quantize(x, "fp8_e4m3", overflow="ieee").isnan().all()
    assert fake_quantize(x, "fp16", overflow="saturate").tolist() == [65504, -65504, math.inf]
    assert fake_quantize(x, "fp4_e2m1").tolist() == [6, -6, 6]
    assert fake_quantize(x, "fixed3_4").tolist() == [7.9375, -8, 7.9375]


def test_subnormals_of_the_format_or_of_the_call() -> None:
    x = torch.tensor([2.0**-9])
    assert fake_quantize(x, "fp8_e4m3").item() == 2.0**-9
    assert fake_quantize(x, "fp8_e4m3", subnormal=False).item() == 0
    assert fake_quantize(x, FloatFormat(4, 3, encoding="fn", subnormal=False)).item() == 0


# --- integers and fixed point -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", DETERMINISTIC)
def test_fixed_point_against_the_rational_oracle(mode: str) -> None:
    """Fixed point is the subnormal part of a floating-point format."""
    fmt = FixedFormat(3, 4)
    ticks = np.arange(-(2**9), 2**9) / 64
    x = np.unique(np.concatenate([ticks, np.nextafter(ticks, -9), np.nextafter(ticks, 9)]))
    inside = x[np.abs(x) <= 7.9]
    expected = [exact_round(float(v) * 16, FloatFormat(2, 40, bias=-39), mode) / 16 for v in inside]
    ours = fake_quantize(torch.from_numpy(inside), fmt, rounding=mode)
    assert torch.equal(ours, torch.tensor(expected, dtype=torch.float64))


def reduced(x: Tensor, granularity: Granularity) -> Tensor:
    """The largest magnitude of each group, expanded to x: written with loops."""
    result = torch.empty_like(x)
    for index in np.ndindex(*x.shape):
        if granularity.kind == "tensor":
            group = x
        elif granularity.kind == "channel":
            axis = granularity.axis % x.dim()
            group = x.select(axis, index[axis])
        else:
            row = x[index[:-1]]
            start = index[-1] // granularity.size * granularity.size if granularity.kind == "group" else 0
            group = row[start : start + granularity.size] if granularity.kind == "group" else row
        result[index] = group.abs().max()
    return result


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_integers_with_absmax_scales(granularity: Granularity) -> None:
    x = torch.randn(3, 4, 11)
    scale = reduced(x, granularity) / 127
    assert torch.equal(
        fake_quantize(x, "int8", granularity=granularity), torch.round(x / scale).clamp(-127, 127) * scale
    )


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_floats_with_absmax_scales(granularity: Granularity) -> None:
    x = (torch.randn(3, 4, 11) * 1e4).requires_grad_()
    scale = reduced(x.detach(), granularity) / 448
    ratio = (x.detach() / scale).double().numpy()
    expected = torch.from_numpy(Table(formats["fp8_e4m3"]).round(ratio, "nearest", overflow="saturate")).float() * scale
    y = fake_quantize(x, "fp8_e4m3", granularity=granularity, scale="absmax")
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_integers_with_a_given_scale_equal_those_of_pytorch(dtype: torch.dtype) -> None:
    x = (torch.randn(200, dtype=dtype) * 4).requires_grad_()
    scale, zero = torch.tensor(0.0625, dtype=dtype), torch.tensor(3, dtype=torch.int32)
    ours = fake_quantize(x, IntFormat(8, symmetric=False), scale=scale, zero_point=zero, clip_grad=True)
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.0625, 3, -128, 127)
    assert torch.equal(ours, theirs)
    position = x.detach() / scale + zero
    inside = (position >= -128) & (position <= 127)
    assert not inside.all()
    assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], inside.to(dtype))


def test_gradient_of_a_learnt_scale() -> None:
    """1902.08153, equation 3."""
    x = torch.tensor([0.3, -2.6, 40.0, -50.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y = fake_quantize(x, "int4", scale=scale, clip_grad=True)
    grad_x, grad_scale = torch.autograd.grad(y.sum(), (x, scale))
    assert grad_x.tolist() == [1, 1, 0, 0]
    assert grad_scale.item() == pytest.approx((1 - 0.6) + (-5 + 5.2) + 7 - 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mode", "exact"), [("nearest", round), ("towards_zero", math.trunc)])
def test_integers_that_processors_round_to(dtype: torch.dtype, mode: str, exact: Any) -> None:
    top = 2.0 ** -round(math.log2(torch.finfo(dtype).eps))
    numbers = [0.5, 1.5, 2.5, 0.2, 0.75, 126.5, top - 0.5, top - 1.5, top / 2 + 0.5, top + 1, 3e30, 1e-40, 0.0]
    x = torch.tensor([*numbers, *(-v for v in numbers)], dtype=dtype)
    expected = torch.tensor([float(exact(v)) for v in x.tolist()], dtype=dtype)
    carrier = core.compute_carrier(dtype)
    y = round_to_multiples(x, carrier, 0, mode)
    assert torch.equal(y.view(carrier.int_dtype), expected.view(carrier.int_dtype)), "no −0 either"
    compiled = torch.compile(lambda x: round_to_multiples(x, carrier, 0, mode), fullgraph=True)(x)
    assert torch.equal(compiled.view(carrier.int_dtype), y.view(carrier.int_dtype))
    ends = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)
    assert torch.equal(round_to_multiples(ends, carrier, 0, mode).nan_to_num(7), ends.nan_to_num(7))


def test_asymmetric_integers_hold_zero_exactly() -> None:
    for x in (torch.rand(100) + 5, -torch.rand(100), torch.randn(100) + 1):
        x[3] = 0
        y = fake_quantize(x, "int4_asymmetric")
        assert y[3] == 0
        assert len(y.unique()) <= 16
        step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 15
        assert ((y - x).abs() <= step).all()


def test_clipped_gradients_of_scaled_floats() -> None:
    x = torch.tensor([1.0, 5.5, -300.0], requires_grad=True)
    y = fake_quantize(x, "fp4_e2m1", scale=torch.tensor(2.0), clip_grad=True)
    assert y.tolist() == [1.0, 6.0, -12.0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [1, 1, 0]


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "int8", "int8_asymmetric"])
def test_nothing_is_clipped_by_a_scale_from_the_tensor(name: str) -> None:
    """Rounding may put the largest value an ulp beyond the largest number; it is not clipped all the same."""
    x = torch.randn(2000, 8).requires_grad_()
    y = fake_quantize(x, name, scale="absmax", granularity="token", clip_grad=True)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))


# --- blocks -----------------------------------------------------------------------------------------------------------


def expected_blocks(x: np.ndarray, fmt: BlockFormat, mode: str) -> np.ndarray:
    """OCP MX 1.0 §6.3 on one row, in Python numbers."""
    result = []
    element = fmt.element
    for start in range(0, len(x), fmt.block_size):
        block = x[start : start + fmt.block_size]
        largest = np.abs(block).max()
        exponent = (math.frexp(largest)[1] - 1 if largest else -200) - element.emax
        scale = 2.0 ** min(max(exponent, -127), 127)
        if isinstance(element, FloatFormat):
            rounded = Table(element).round(block / scale, mode, overflow="saturate")
        else:
            ticks = [
                exact_round(v / scale / element.quantum, FloatFormat(2, 40, bias=-39), mode) for v in block.tolist()
            ]
            rounded = np.clip(np.array(ticks) * element.quantum, element.min, element.max)
        result.append(rounded * scale)
    return np.concatenate(result)


@pytest.mark.parametrize("mode", ["nearest", "plus_inf", "towards_zero", "odd"])
@pytest.mark.parametrize("name", [name for name, fmt in formats.items() if isinstance(fmt, BlockFormat)])
def test_blocks(name: str, mode: str) -> None:
    fmt = formats[name]
    assert isinstance(fmt, BlockFormat)
    x = torch.randn(100, dtype=torch.float64) * torch.exp2(torch.randint(-6, 6, (100,)))
    x[32:64] *= 1e-30
    x[70] = 0
    x = x.float()
    ours = fake_quantize(x, fmt, rounding=mode)
    expected = torch.from_numpy(expected_blocks(x.double().numpy(), fmt, mode))
    assert torch.equal(ours.double(), expected)


def test_blocks_at_the_ends_of_float32() -> None:
    x = torch.zeros(4, 32)
    x[0, 0] = torch.finfo(torch.float32).max
    x[1, 0] = 2.0**-149
    x[2, :2] = torch.tensor([2.0**127, 2.0**-149])
    for name in ("mxfp4", "mxfp8", "mxint8"):
        y = fake_quantize(x, name)
        assert y.isfinite().all()
        assert y[0, 0] > 2.0**126
        assert fake_quantize(x, name, rounding="plus_inf")[2, 1] > 0
    assert torch.equal(fake_quantize(torch.zeros(2, 40), "mxfp4"), torch.zeros(2, 40))


def test_blocks_agree_with_ml_dtypes() -> None:
    x = torch.randn(64, 32) * 20
    exponent = torch.frexp(x.abs().amax(1, keepdim=True)).exponent - 1 - 2
    scaled = (x.double() * torch.exp2(-exponent.double())).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    expected = torch.from_numpy(scaled) * torch.exp2(exponent.double())
    assert torch.equal(fake_quantize(x, "mxfp4").double(), expected)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stoc_prop"])
def test_compiled_equals_eager(rounding: str) -> None:
    names = ["int8", "int4_asymmetric", "fixed3_4", "mxfp8_e5m2", "mxint8"]
    x = torch.randn(7, 75) * 3
    compiled = torch.compile(fake_quantize_rows, fullgraph=True)(x, names, rounding)
    for name, ours, eager in zip(names, compiled, fake_quantize_rows(x, names, rounding), strict=True):
        assert same_bits(ours, eager), name


def test_compiled_draws_follow_manual_seed() -> None:
    compiled = torch.compile(lambda x: fake_quantize(x, "fp8_e5m2", rounding=5), fullgraph=True)
    x = torch.full((500,), 1.1)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first)
    assert not torch.equal(first, second)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.uint8, torch.float8_e5m2], ids=str)
def test_dtypes_that_are_refused(dtype: torch.dtype) -> None:
    x = torch.zeros(3).to(dtype)
    for function in (
        lambda: fake_quantize(x, "fp16"),
        lambda: absmax_quantize(x),
        lambda: FloatPrecisionSimulator(5, 2)(x),
    ):
        with pytest.raises(TypeError, match=f"expected a tensor of float16, .* got {dtype}"):
            function()
    with pytest.raises(TypeError, match="got float"):
        fake_quantize(1.0, "fp16")  # type: ignore[arg-type]


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "mode name": (ValueError, "unknown rounding mode 'up'; valid are 0 nearest_odd, 1 nearest", {"rounding": "up"}),
    "mode number": (ValueError, "unknown rounding mode 10", {"rounding": 10}),
    "mode kind": (ValueError, "unknown rounding mode True", {"rounding": True}),
    "format": (ValueError, "unknown format 'fp7'; valid names are fp64", {"fmt": "fp7"}),
    "format kind": (TypeError, "expected a format or its name", {"fmt": 8}),
    "overflow": (ValueError, "unknown overflow 'wrap'; valid are ieee, saturate", {"overflow": "wrap"}),
    "overflow of finite": (ValueError, "can only saturate", {"fmt": "fp4_e2m1", "overflow": "ieee"}),
    "overflow of integers": (ValueError, "can only saturate", {"fmt": "int8", "overflow": "ieee"}),
    "scale name": (ValueError, "or 'absmax', got 'max'", {"scale": "max"}),
    "scale of blocks": (ValueError, "brings its own scale", {"fmt": "mxfp4", "scale": "absmax"}),
    "zero point": (ValueError, "zero_point needs", {"fmt": "fp16", "zero_point": torch.tensor(1)}),
    "axis": (ValueError, "axis 3 for a tensor of 1", {"fmt": "int8", "granularity": Granularity("channel", axis=3)}),
    "granularity": (ValueError, "unknown granularity 'row'", {"fmt": "int8", "granularity": "row"}),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what: str) -> None:
    kind, message, arguments = BAD[what]
    with pytest.raises(kind, match=message):
        fake_quantize(torch.ones(3), **{"fmt": "fp16", **arguments})


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ValueError, (1, 3)),
        (ValueError, (5, 60)),
        (TypeError, (5.5, 3)),
        (ValueError, (5, 2, 11)),
        (ValueError, (5, 2, "up")),
    ],
)
def test_simulators_that_make_no_sense(kind: type[Exception], arguments: tuple[Any, ...]) -> None:
    with pytest.raises(kind, match=r"must|unknown rounding mode"):
        FloatPrecisionSimulator(*arguments)
    with pytest.raises(ValueError, match="unknown overflow 'wrap'"):
        FloatPrecisionSimulator(5, 2, overflow="wrap")
