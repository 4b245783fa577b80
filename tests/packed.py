"""Settings of a quantisation inside an op, from those of `fake_quantize`."""

from __future__ import annotations

from fuse_pass.ops.fake_quantize import FloatRounding
from fuse_pass.ops.packed_format import pack


def packed_format(
    exp_bits: int, sig_bits: int, bias: int, encoding: str, rounding: str, subnormal: bool, overflow: str
) -> list[int]:
    return pack(FloatRounding(exp_bits, sig_bits, bias, encoding, rounding, subnormal, overflow))
