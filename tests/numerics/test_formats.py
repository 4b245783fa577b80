"""Every row of the table of formats, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fuse_pass.numerics.formats import (
    BlockFormat,
    FixedFormat,
    FloatFormat,
    Granularity,
    IntFormat,
    as_format,
    formats,
)

ml_dtypes = pytest.importorskip("ml_dtypes")

FLOATS = {name: fmt for name, fmt in formats.items() if isinstance(fmt, FloatFormat)}
# name: bits, largest, smallest normal, smallest subnormal, as the standards state them
STATED = {
    "fp64": (64, 1.7976931348623157e308, 2.0**-1022, 2.0**-1074),
    "fp32": (32, 3.4028234663852886e38, 2.0**-126, 2.0**-149),
    "tf32": (19, 3.4011621342146535e38, 2.0**-126, 2.0**-136),
    "fp16": (16, 65504.0, 2.0**-14, 2.0**-24),
    "bf16": (16, 3.3895313892515355e38, 2.0**-126, 2.0**-133),
    "fp8_e4m3": (8, 448.0, 2.0**-6, 2.0**-9),
    "fp8_e5m2": (8, 57344.0, 2.0**-14, 2.0**-16),
    "fp8_e4m3fnuz": (8, 240.0, 2.0**-7, 2.0**-10),
    "fp8_e5m2fnuz": (8, 57344.0, 2.0**-15, 2.0**-17),
    "fp6_e2m3": (6, 7.5, 1.0, 0.125),
    "fp6_e3m2": (6, 28.0, 0.25, 0.0625),
    "fp4_e2m1": (4, 6.0, 1.0, 0.5),
    "e8m0": (8, 2.0**127, 2.0**-127, 2.0**-127),
}


@pytest.mark.parametrize("name", FLOATS)
def test_floating_point_formats_are_as_their_standards_say(name: str) -> None:
    fmt = FLOATS[name]
    assert (fmt.bits, fmt.max, fmt.smallest_normal, fmt.smallest_subnormal) == STATED[name]
    assert fmt.name == name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp64", torch.float64),
        ("fp32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp8_e4m3", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
        ("fp8_e4m3fnuz", torch.float8_e4m3fnuz),
        ("fp8_e5m2fnuz", torch.float8_e5m2fnuz),
    ],
)
def test_formats_that_are_dtypes_have_their_limits(name: str, dtype: torch.dtype) -> None:
    fmt, info = FLOATS[name], torch.finfo(dtype)
    assert (fmt.bits, fmt.max, fmt.smallest_normal) == (info.bits, info.max, info.tiny)
    assert fmt.eps == (0.25 if name == "fp8_e5m2fnuz" else info.eps)  # torch 2.13 says 0.125 there


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp6_e2m3", "float6_e2m3fn"), ("fp6_e3m2", "float6_e3m2fn"), ("fp4_e2m1", "float4_e2m1fn")],
)
def test_small_formats_have_the_limits_of_ml_dtypes(name: str, dtype: str) -> None:
    fmt, info = FLOATS[name], ml_dtypes.finfo(getattr(ml_dtypes, dtype))
    limits = (fmt.max, fmt.smallest_normal, fmt.smallest_subnormal)
    assert limits == (float(info.max), float(info.smallest_normal), float(info.smallest_subnormal))


@pytest.mark.parametrize("name", formats)
def test_every_row(name: str) -> None:
    fmt = formats[name]
    assert fmt.name == name
    assert as_format(name) is fmt
    assert as_format(fmt) is fmt
    assert pickle.loads(pickle.dumps(fmt)) == fmt == copy.deepcopy(fmt)
    assert hash(fmt) == hash(copy.deepcopy(fmt))
    with pytest.raises(AttributeError):
        fmt.name = "other"  # type: ignore[misc]
    assert fmt.bits >= 2


def test_a_format_is_its_numbers_and_not_its_name() -> None:
    assert FloatFormat(5, 10) == formats["fp16"]
    assert FloatFormat(4, 3) != formats["fp8_e4m3"]
    assert FloatFormat(4, 3).max == 240
    assert {FloatFormat(8, 7): 1}[formats["bf16"]] == 1  # type: ignore[index]


def test_the_table_is_read_only_and_lists_what_it_has() -> None:
    with pytest.raises(TypeError):
        formats["mine"] = FloatFormat(3, 3)  # type: ignore[index]
    for kind in (KeyError, ValueError):
        with pytest.raises(kind, match=r"unknown format 'fp9'; valid names are .*fp8_e4m3.*int8.*mxfp4"):
            formats["fp9"]
    assert "fp9" not in formats
    assert formats.get("fp9") is None
    wanted = {"mxfp8", "mxfp6", "mxfp4", "mxint8", "bfp", *(f"int{bits}" for bits in range(2, 17)), *STATED}
    assert wanted <= set(formats)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ValueError, (1, 3)),
        (ValueError, (12, 3)),
        (ValueError, (5, 0)),
        (ValueError, (5, 53)),
        (TypeError, (5.0, 3)),
        (TypeError, (5, 2.5)),
        (TypeError, ("5", 3)),
        (TypeError, (True, 3)),
    ],
)
def test_bits_of_floating_point(kind: type[Exception], arguments: tuple[int, int]) -> None:
    with pytest.raises(kind, match=r"(exp|sig)_bits must (lie in (2…11|1…52)|be an integer)"):
        FloatFormat(*arguments)


def test_other_arguments_that_make_no_format() -> None:
    with pytest.raises(ValueError, match="unknown encoding 'posit'; valid are ieee, fn"):
        FloatFormat(5, 2, encoding="posit")
    with pytest.raises(ValueError, match="do not fit float64"):
        FloatFormat(11, 2, bias=1000)
    with pytest.raises(ValueError, match="do not fit float64"):
        FloatFormat(11, 2, encoding="finite")
    for bits in (1, 17):
        with pytest.raises(ValueError, match="bits must lie in 2…16"):
            IntFormat(bits)
    with pytest.raises(TypeError, match=r"bits must be an integer, got 8\.0"):
        IntFormat(8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int_bits must lie in 0…31, got -1"):
        FixedFormat(-1, 4)
    with pytest.raises(ValueError, match="both 0"):
        FixedFormat(0, 0)
    with pytest.raises(TypeError, match="element of a block"):
        BlockFormat(IntFormat(8), 32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_size must lie in"):
        BlockFormat(FloatFormat(2, 1), 0)
    with pytest.raises(TypeError, match="scale of a block"):
        BlockFormat(FloatFormat(2, 1), 32, FloatFormat(4, 3))
    with pytest.raises(TypeError, match="expected a format or its name, got 8"):
        as_format(8)  # type: ignore[arg-type]


def test_ranges_of_integers_and_fixed_point() -> None:
    assert [(fmt.quant_min, fmt.quant_max) for fmt in (IntFormat(8), IntFormat(8, symmetric=False), IntFormat(2))] == [
        (-127, 127),
        (-128, 127),
        (-1, 1),
    ]
    fixed = FixedFormat(3, 4)
    assert (fixed.bits, fixed.min, fixed.max, fixed.quantum) == (8, -8.0, 7.9375, 0.0625)
    assert FixedFormat(1, 6, symmetric=True).min == -1.984375
    assert BlockFormat(FloatFormat(2, 1, encoding="finite"), 32).bits == 4.25


def test_granularity() -> None:
    assert Granularity("channel").axis == 0
    assert Granularity("group", size=32).size == 32
    with pytest.raises(ValueError, match="unknown granularity 'row'; valid are tensor, channel, group, token"):
        Granularity("row")
    with pytest.raises(TypeError, match=r"size \(elements of a group\) must be an integer"):
        Granularity("group")
    with pytest.raises(ValueError, match="only granularity 'channel' has an axis"):
        Granularity("token", axis=1)
    with pytest.raises(ValueError, match="only granularity 'group' has a size"):
        Granularity("tensor", size=4)
