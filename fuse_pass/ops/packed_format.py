"""The settings of a deterministic `fake_quantize` as integers, for ops that quantise a value inside.

An op's schema knows lists of integers but no formats: `pack` makes one, an empty list stands for no quantisation, and
two lists put together for one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor

from fuse_pass.numerics.formats import ENCODINGS
from fuse_pass.numerics.rounding import ROUNDINGS
from fuse_pass.ops.fake_quantize import OVERFLOWS, FloatRounding, fake_quantize

_LENGTH = len(dataclasses.fields(FloatRounding))


def pack(how: FloatRounding) -> list[int]:
    names = (ENCODINGS.index(how.encoding), ROUNDINGS.index(how.rounding))
    return [how.exp_bits, how.sig_bits, how.bias, *names, int(how.subnormal), OVERFLOWS.index(how.overflow)]


def _unpack(settings: Sequence[int]) -> FloatRounding:
    exp_bits, sig_bits, bias, encoding, rounding, subnormal, overflow = settings
    names = (ENCODINGS[encoding], ROUNDINGS[rounding])
    return FloatRounding(exp_bits, sig_bits, bias, *names, bool(subnormal), OVERFLOWS[overflow])


def _each(settings: Sequence[int]) -> Iterator[FloatRounding]:
    for start in range(0, len(settings), _LENGTH):
        yield _unpack(settings[start : start + _LENGTH])


def quantize_packed(x: Tensor, settings: Sequence[int]) -> Tensor:
    """x rounded, for use inside the body of an op (no gradient of its own); x itself for an empty list."""
    for how in _each(settings):
        x = how.rounded(x)
    return x


def straight_through_packed(x: Tensor, settings: Sequence[int]) -> Tensor:
    """The same as a differentiable operation."""
    for how in _each(settings):
        x = fake_quantize(x, None, *dataclasses.astuple(how), False)
    return x
