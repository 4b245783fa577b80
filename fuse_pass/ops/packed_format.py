"""The settings of a deterministic `fake_quantize` as integers, for ops that quantise a value inside.

An op's schema knows lists of integers but no formats: `pack` makes one, an empty list stands for no quantisation, and
two lists put together for one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fuse_pass.formats import ENCODINGS
from fuse_pass.ops.fake_quantize import OVERFLOWS, fake_quantize, round_to_format
from fuse_pass.ops.rounding import ROUNDINGS

_LENGTH = 7


def pack(
    exp_bits: int, sig_bits: int, bias: int, encoding: str, rounding: str, subnormal: bool, overflow: str
) -> list[int]:
    """Seven integers from the arguments that `fuse_pass::fake_quantize` takes between the seed and `clip_grad`."""
    names = (ENCODINGS.index(encoding), ROUNDINGS.index(rounding), int(subnormal), OVERFLOWS.index(overflow))
    return [exp_bits, sig_bits, bias, *names]


def _unpack(settings: Sequence[int]) -> tuple[int, int, int, str, str, bool, str, bool]:
    exp_bits, sig_bits, bias, encoding, rounding, subnormal, overflow = settings
    names = (ENCODINGS[encoding], ROUNDINGS[rounding], bool(subnormal), OVERFLOWS[overflow])
    return exp_bits, sig_bits, bias, *names, False


def _each(settings: Sequence[int]) -> Iterator[tuple[int, int, int, str, str, bool, str, bool]]:
    for start in range(0, len(settings), _LENGTH):
        yield _unpack(settings[start : start + _LENGTH])


def quantize_packed(x: Tensor, settings: Sequence[int]) -> Tensor:
    """x rounded, for use inside the body of an op (no gradient of its own); x itself for an empty list."""
    for arguments in _each(settings):
        x = round_to_format(x, None, *arguments)
    return x


def straight_through_packed(x: Tensor, settings: Sequence[int]) -> Tensor:
    """The same as a differentiable operation."""
    for arguments in _each(settings):
        x = fake_quantize(x, None, *arguments)
    return x
