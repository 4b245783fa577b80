"""Rounding by arithmetic gives the bits of rounding by bits: plain PyTorch on both sides, nothing of ONNX."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fuse_pass.integrations.onnx import bits, rounding
from fuse_pass.numerics.formats import FloatFormat, formats
from fuse_pass.numerics.rounding import FLOAT32, FLOAT64, ROUNDINGS, STOCHASTIC, Carrier
from fuse_pass.ops.fake_quantize import FloatRounding
from fuse_pass.ops.fake_quantize_int import round_to_multiples

MODES = [mode for mode in ROUNDINGS if mode not in STOCHASTIC]
FORMATS = [
    *(fmt for fmt in formats.values() if isinstance(fmt, FloatFormat)),
    FloatFormat(8, 22),
    FloatFormat(5, 30),
    FloatFormat(2, 1),
    FloatFormat(3, 1, encoding="fnuz"),
    FloatFormat(11, 3),
    FloatFormat(8, 7, bias=100),
]


def values(dtype: torch.dtype) -> Tensor:
    """All magnitudes, ties of many formats and their neighbours, infinities, NaN and both zeros."""
    generator = torch.Generator().manual_seed(3)
    anywhere = torch.randint(-(2**31), 2**31, (3000,), generator=generator).to(torch.int32).view(torch.float32)
    ties = torch.cat([torch.arange(-600, 600) / 64.0, torch.arange(-64, 64) * 2.0**-20])
    ends = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 448, 464, 480, 57344, 61440, 65520, 240, 248])
    x = torch.cat([anywhere, torch.randn(500, generator=generator) * 8, ties, ends])
    x = torch.cat([x, *(x.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf))])
    if dtype is torch.float64:
        wide = torch.randint(-(2**62), 2**62, (3000,), generator=generator) * 2
        x = torch.cat([x.double(), wide.view(torch.float64)])
    return x.to(dtype)


def differing(a: Tensor, b: Tensor) -> Tensor:
    return ~(((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_floating_point(fmt: FloatFormat, dtype: torch.dtype) -> None:
    x = values(dtype)
    for subnormal, mode, overflow in itertools.product((True, False), MODES, ("ieee", "saturate")):
        if overflow == "ieee" and not fmt.has_nan:
            continue
        how = FloatRounding(fmt.exp_bits, fmt.sig_bits, fmt.bias, fmt.encoding, mode, subnormal, overflow)
        wrong = differing(rounding.rounded(x, how), how.rounded(x))
        assert not wrong.any(), (subnormal, mode, overflow, x[wrong][:3])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("carrier", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_integers(carrier: Carrier, mode: str) -> None:
    x = values(carrier.dtype)
    expected = round_to_multiples(x, carrier, 0, mode)
    assert not differing(rounding.round_signed(x, mode), expected).any()


@pytest.mark.parametrize("carrier", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_bits_of_numbers_and_back(carrier: Carrier) -> None:
    x = values(carrier.dtype)
    expected = x.view(carrier.int_dtype)
    found = bits.bits_of(x, carrier)
    assert torch.equal(found[~x.isnan()], expected[~x.isnan()])
    assert (found[x.isnan()] == carrier.nan).all()
    assert not differing(bits.number_of(expected, carrier), x).any()


def test_bytes() -> None:
    octets = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(bits.view_dtype(octets, torch.int8), octets.view(torch.int8))
    assert torch.equal(bits.view_dtype(octets.view(torch.int8), torch.uint8), octets)
    words = octets.view(torch.int32).view(16, 4)
    assert torch.equal(bits.view_dtype(words, torch.uint8), words.view(torch.uint8))
    with pytest.raises(NotImplementedError, match="between floats and integers of one width, got "):
        bits.view_dtype(words.long(), torch.uint8)


@pytest.mark.parametrize("span", [0, 1, 15, 63, 64, 253, 2046])
def test_steps_reach_every_number(span: int) -> None:
    for number in range(span + 1):
        rest = number
        for step in rounding.steps_to(span):
            rest -= step if rest >= step else 0
        assert rest == 0
