"""Fake quantisation in ONNX Runtime: the bits of ours, over formats, granularities, modes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from fuse_pass import FloatFormat, Granularity, fake_quantize, formats
from fuse_pass.integrations.onnx import OpsetError
from fuse_pass.numerics.formats import BlockFormat, FixedFormat, IntFormat
from fuse_pass.numerics.rounding import ROUNDINGS, STOCHASTIC
from tests.integrations.onnx.runtime import Exported, assert_same_bits

FLOAT_FORMATS = [fmt for fmt in formats.values() if isinstance(fmt, FloatFormat)]
MODES = [mode for mode in ROUNDINGS if mode not in STOCHASTIC]


class Each(nn.Module):
    """Several fake quantisations of one tensor: an export takes longer than all of them."""

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(x) for function in self.functions)


def check(functions: dict[str, Callable[[Tensor], Tensor]], *tensors: Tensor, **options: Any) -> Exported:
    """The same bits for every function and tensor; the first one is the example."""
    model = Each(list(functions.values()))
    exported = Exported(model, tensors[0], **options)
    for x in tensors:
        found = exported(x) if len(functions) > 1 else (exported(x),)
        for name, actual, expected in zip(functions, found, model(x), strict=True):
            try:
                assert_same_bits(actual, expected, x)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
    return exported


def every_half(dtype: torch.dtype) -> Tensor:
    """All numbers of bfloat16 and float16 with ties of every small format among them, zeros, infinities and NaN."""
    codes = torch.arange(-(2**15), 2**15).to(torch.int16)
    return torch.cat([codes.view(torch.bfloat16).to(dtype), codes.view(torch.float16).to(dtype)])


def of_format(fmt: Any, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: fake_quantize(x, fmt, **options)


def test_fp8_is_that_of_onnx_for_every_half() -> None:
    """Every code, tie and overflow of the four fp8 formats is a bfloat16 or a float16; and float32 next to them."""
    names = ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz")
    functions = {
        f"{name} {overflow}": of_format(name, overflow=overflow) for name in names for overflow in ("ieee", "saturate")
    }
    x = every_half(torch.float32)
    beside = [x.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf)]
    exported = check(functions, x, *beside)
    # By arithmetic: infinities of e5m2, which ONNX would saturate as well.
    assert exported.nodes["QuantizeLinear"] == exported.nodes["DequantizeLinear"] == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floating_point(dtype: torch.dtype) -> None:
    x = every_half(torch.float64).to(dtype)[::7].contiguous()
    if dtype is torch.bfloat16:  # NumPy has none
        check_in_bfloat16({fmt.name: of_format(fmt) for fmt in FLOAT_FORMATS}, x)
    else:
        check({fmt.name: of_format(fmt) for fmt in FLOAT_FORMATS}, x)


def check_in_bfloat16(functions: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> None:
    inside = {
        name: (lambda x, function=function: function(x.to(torch.bfloat16)).float())
        for name, function in functions.items()
    }
    check(inside, x.float())


@pytest.mark.parametrize("fmt", ["fp8_e4m3", "fp6_e3m2", "tf32", "int4", "int8_asymmetric"])
def test_rounding_modes(fmt: str) -> None:
    x = torch.cat([torch.arange(-200, 200) / 8.0, torch.randn(300) * 3, torch.tensor([0.0, -0.0, 1e-30, 500, -1e30])])
    check({mode: of_format(fmt, rounding=mode) for mode in MODES}, x)


def test_without_subnormals() -> None:
    functions = {
        f"{fmt.name} {mode}": of_format(fmt, subnormal=False, rounding=mode)
        for fmt in (formats["fp8_e5m2"], formats["fp4_e2m1"], FloatFormat(3, 4))
        for mode in MODES
    }
    check(functions, every_half(torch.float32)[::11].contiguous())


GRANULARITIES = {
    "tensor": Granularity("tensor"),
    "rows": Granularity("channel", axis=0),
    "last": Granularity("channel", axis=-1),
    "middle": Granularity("channel", axis=1),
    "groups": Granularity("group", size=8),
    "groups and a rest": Granularity("group", size=7),
    "token": Granularity("token"),
}


def with_ties(*shape: int) -> Tensor:
    """Multiples of a half around a largest value that is a power of two less one, so that quotients are ties."""
    x = torch.randint(-254, 255, shape) / 2
    x[..., 0] = 127
    x[..., 1] = -0.0
    return x


@pytest.mark.parametrize("kind", list(GRANULARITIES))
def test_integers_with_scales_of_the_tensor(kind: str) -> None:
    names = ("int2", "int4", "int8", "int12", "int16", "int3_asymmetric", "int4_asymmetric", "int8_asymmetric")
    functions = {name: of_format(name, granularity=GRANULARITIES[kind]) for name in names}
    zeros, spoiled = torch.zeros(3, 4, 16), with_ties(3, 4, 16)
    spoiled[1, 2, 3] = math.nan
    check(functions, with_ties(3, 4, 16), torch.randn(3, 4, 16), zeros, torch.randn(3, 4, 16) * 1e-42, spoiled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_integers_of_other_dtypes(dtype: torch.dtype) -> None:
    functions = {name: of_format(name, granularity="token") for name in ("int4", "int8", "int8_asymmetric")}
    check(functions, with_ties(5, 24).to(dtype), torch.randn(5, 24).to(dtype))


def test_integers_with_scales_that_were_set() -> None:
    """Overflow, infinities, and a zero point; the word for each granularity, and arithmetic where there is none."""
    functions = {}
    scales = {
        "tensor": (),
        "rows": (3, 1, 1),
        "last": (16,),
        "blocks": (3, 4, 1),
        "steps": (3, 1, 16),
        "elements": (3, 4, 16),
    }
    for name, shape in {**scales, "elements": (3, 4, 16)}.items():
        scale = 2.0 ** torch.randint(-3, 1, shape)
        zero = torch.randint(-8, 8, shape).float()
        for fmt in ("int4", "int8", "int16"):
            functions[f"{name} {fmt}"] = of_format(fmt, scale=scale)
            functions[f"{name} {fmt} zero"] = of_format(f"{fmt}_asymmetric", scale=scale, zero_point=zero)
    x = with_ties(3, 4, 16)
    beyond = x * 1e6
    beyond[0, 0] = math.inf
    beyond[1, 1] = -math.inf
    exported = check(functions, x, beyond, x * 1e-40)
    assert exported.nodes["QuantizeLinear"] == exported.nodes["DequantizeLinear"] == 30  # and not elements


def test_nan_with_a_scale_that_was_set_is_nan_or_an_integer() -> None:
    """What the documents say: ONNX leaves open which integer it becomes."""
    exported = Exported(Each([of_format("int8", scale=torch.tensor(0.5))]), torch.zeros(3))
    y = exported(torch.tensor([1.0, math.nan, -1.0]))
    assert y[0] == 1.0
    assert y[2] == -1.0
    assert math.isnan(y[1]) or (2 * y[1]).frac() == 0


def check_blocks(names: Sequence[str]) -> None:
    x = torch.randn(3, 80) * 2.0 ** torch.randint(-30, 30, (3, 80))
    x[0, :40] = 0
    x[1, 5] = math.inf
    check({name: of_format(name) for name in names}, x, torch.randn(3, 80), torch.randn(3, 80) * 1e-40)


def test_a_block_with_nan() -> None:
    x = torch.randn(3, 80)
    x[2, 40] = math.nan
    check({"mxfp8": of_format("mxfp8")}, x)


def test_blocks_and_fixed_point() -> None:
    check_blocks(("mxfp4", "mxint8", "fixed7_8", "fixed15_16"))


@pytest.mark.slow
def test_all_blocks_and_fixed_point() -> None:
    check_blocks([name for name, fmt in formats.items() if isinstance(fmt, (BlockFormat, FixedFormat))])


def test_scaled_floating_point() -> None:
    functions = {
        f"{name} {granularity}": of_format(name, scale="absmax", granularity=granularity)
        for name in ("fp8_e4m3", "fp4_e2m1", "fp8_e5m2")
        for granularity in ("tensor", "token")
    }
    check(functions, torch.randn(6, 32), with_ties(6, 32), torch.zeros(6, 32))


def test_a_model_of_many_bits_is_no_longer_than_it_must_be() -> None:
    exported = check({"int8": of_format("int8", scale=torch.tensor(0.25))}, torch.randn(4))
    assert sum(exported.nodes.values()) == 3  # symmetric: clipped, there, and back
    exported = check(
        {"int8": of_format("int8_asymmetric", scale=torch.tensor(0.25), zero_point=torch.tensor(3.0))}, torch.randn(4)
    )
    assert sum(exported.nodes.values()) == 2


@pytest.mark.parametrize(
    ("fmt", "options", "opset", "needed"),
    [
        ("int4", {}, 20, 21),
        ("int16", {}, 20, 21),
        ("fp8_e4m3", {}, 18, 19),
        ("int8", {"granularity": "token"}, 20, 21),
    ],
)
def test_an_opset_that_is_too_old(fmt: str, options: Any, opset: int, needed: int) -> None:
    model = Each([of_format(fmt, **options)])
    with pytest.raises(OpsetError, match=f"needs opset {needed} or newer, got opset_version={opset}"):
        Exported(model, torch.randn(4, 3, 5), opset_version=opset)


def test_an_older_opset_that_will_do() -> None:
    assert isinstance(formats["int8"], IntFormat)
    check({"int8": of_format("int8"), "fp4": of_format("fp4_e2m1")}, with_ties(4, 8), opset_version=18)
