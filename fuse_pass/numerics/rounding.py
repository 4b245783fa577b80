"""Rounding by bit fields: integer arithmetic on the bits of float32 and float64, the same everywhere, exact.

The bits of a magnitude, read as an integer, grow with it. Rounding to a grid whose neighbours differ in bit `shift` is

    (bits + increment) & (-1 << shift)

and each rounding mode is one increment; a carry out of the fraction enters the exponent, which is what it should do.
Above the smallest normal number 2**emin of the grid `shift` is the number of fraction bits dropped, below it grows by
one with every binade. Magnitudes below the smallest positive one of the grid have two neighbours, 0 and that one, and
go up from a threshold on. There is no logarithm, no power, no division and no floating-point operation here, so there
is no double rounding, and neither flushed subnormals nor a compiler's fast mathematics change a bit.

Sources: IEEE 754-2019 §4.3 (directions), §7.4 (overflow); Higham and Pranesh, "Simulating low precision floating-point
arithmetic", 2019 (`chop`); Boldo and Melquiond, 2008 (round to odd).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse_pass.numerics import random_bits

ROUNDINGS = (
    "nearest_odd",
    "nearest",
    "plus_inf",
    "minus_inf",
    "towards_zero",
    "stoc_prop",
    "stoc_equal",
    "nearest_zero",
    "nearest_away",
    "odd",
)
"""Rounding modes by number. The four `nearest_*` and `nearest` (ties to even) differ in ties alone."""

STOCHASTIC = ("stoc_prop", "stoc_equal")
_ALIASES = {"toward_zero": "towards_zero"}
_SECOND_STREAM = 0x5851F42D4C957F2D


def as_rounding(mode: int | str) -> str:
    """The name of a rounding mode given by number or name.

    Raises:
        ValueError: no such mode; the message lists them.
    """
    if isinstance(mode, int) and not isinstance(mode, bool) and 0 <= mode < len(ROUNDINGS):
        return ROUNDINGS[mode]
    name = _ALIASES.get(mode, mode) if isinstance(mode, str) else mode
    if name not in ROUNDINGS:
        valid = ", ".join(f"{number} {name}" for number, name in enumerate(ROUNDINGS))
        raise ValueError(f"unknown rounding mode {mode!r}; valid are {valid}, by number or name")
    return str(name)


@dataclass(frozen=True)
class Carrier:
    """The binary format that carries the values: float32 or float64."""

    dtype: torch.dtype
    int_dtype: torch.dtype
    sig_bits: int
    bias: int

    @property
    def width(self) -> int:
        """Bits without the sign."""
        return 31 if self.int_dtype is torch.int32 else 63

    @property
    def magnitude_mask(self) -> int:
        return (1 << self.width) - 1

    @property
    def infinity(self) -> int:
        return (2 * self.bias + 1) << self.sig_bits

    @property
    def nan(self) -> int:
        return self.infinity | 1 << (self.sig_bits - 1)

    def pattern(self, value: float) -> int:
        """The bits of a number >= 0 that this format holds exactly."""
        real, integer = ("<f", "<i") if self.dtype is torch.float32 else ("<d", "<q")
        return int(struct.unpack(integer, struct.pack(real, value))[0])


FLOAT32 = Carrier(torch.float32, torch.int32, 23, 127)
FLOAT64 = Carrier(torch.float64, torch.int64, 52, 1023)


def compute_carrier(dtype: torch.dtype) -> Carrier:
    """What values of this dtype are computed in: float64 is never narrowed, half types go through float32."""
    return FLOAT64 if dtype is torch.float64 else FLOAT32


def fraction_bits(dtype: torch.dtype) -> int:
    """Explicit fraction bits of a floating-point dtype."""
    return -round(math.log2(torch.finfo(dtype).eps))


@dataclass(frozen=True)
class Grid:
    """The numbers k × 2**(max(e, emin) − sig_bits), as `carrier` sees them; without subnormals 0 and |x| >= 2**emin."""

    carrier: Carrier
    sig_bits: int
    emin: int
    subnormal: bool = True

    @property
    def least_shift(self) -> int:
        """Fraction bits dropped from normal numbers."""
        return max(self.carrier.sig_bits - self.sig_bits, 0)

    @property
    def smallest_exponent(self) -> int:
        return self.emin - self.sig_bits if self.subnormal else self.emin

    @property
    def smallest(self) -> int | None:
        """Bits of the smallest positive number; None where the carrier's own subnormals already end there."""
        if self.subnormal and not self.has_gradual_shift:
            return None
        if self.smallest_exponent + self.carrier.bias < 1 and self.subnormal:
            return None
        return self.carrier.pattern(math.ldexp(1.0, self.smallest_exponent))

    @property
    def has_gradual_shift(self) -> bool:
        """Whether numbers below 2**emin drop more bits than those above."""
        return self.subnormal and self.emin + self.carrier.bias > 1

    def shift(self, magnitude: Tensor) -> Tensor | int:
        """Bits dropped from each magnitude."""
        if not self.has_gradual_shift:
            return self.least_shift
        carrier = self.carrier
        exponent = magnitude >> carrier.sig_bits
        if self.smallest is None:
            exponent = exponent.clamp(min=1)  # the carrier's subnormals have the exponent of its smallest normal
        at_zero = self.emin + carrier.bias + carrier.sig_bits - self.sig_bits
        return (at_zero - exponent).clamp(self.least_shift, carrier.sig_bits)

    def last_bit(self, magnitude: Tensor, shift: Tensor | int) -> Tensor | int:
        """Whether the neighbour below is an odd multiple, 0 or 1."""
        if self.sig_bits == 0:
            return 1
        exponent = self.smallest_exponent + self.carrier.bias
        if self.has_gradual_shift and exponent >= 1 and exponent % 2 == 0:
            # The implicit leading 1 is the last bit there, and what stands in its place is the exponent's last bit.
            magnitude = magnitude + (1 << self.carrier.sig_bits)
        return (magnitude >> shift) & 1

    def threshold(self, rounding: str) -> int:
        """Bits of the smallest magnitude that goes up to `smallest` rather than to 0; deterministic, away from 0."""
        assert self.smallest is not None
        carrier = self.carrier
        if rounding == "towards_zero":
            return self.smallest
        if rounding in ("plus_inf", "minus_inf", "odd"):
            return 1
        half = math.ldexp(1.0, self.smallest_exponent - 1)
        if self.subnormal or self.sig_bits >= carrier.sig_bits:
            return carrier.pattern(half) + (rounding in ("nearest_zero",) or (self.subnormal and rounding == "nearest"))
        # As `chop`: to the grid with subnormals first, then up from half of the smallest normal number on.
        half_step = math.ldexp(1.0, self.emin - self.sig_bits - 1)
        if rounding == "nearest_zero":
            return carrier.pattern(half + half_step) + 1
        to_half = rounding == "nearest_away" or (rounding == "nearest") == (self.sig_bits > 1)
        return carrier.pattern(half - half_step) + (not to_half)


def round_magnitude(
    magnitude: Tensor, negative: Tensor, grid: Grid, rounding: str, random: Tensor | None = None
) -> Tensor:
    """Bits of the rounded magnitude, of unlimited exponent range: what lies beyond a largest number is the caller's.

    Args:
        magnitude: bits without the sign, in `grid.carrier.int_dtype`.
        negative: −1 where the number is negative, else 0.
        grid: what to round to.
        rounding: name of a mode.
        random: uniform bits of the shape and dtype of `magnitude`, for the stochastic modes.
    """
    shift = grid.shift(magnitude)
    rounded = magnitude
    if not isinstance(shift, int) or shift > 0:
        kept: Tensor | int = torch.bitwise_left_shift(-1, shift) if isinstance(shift, Tensor) else -1 << shift
        increment = _increment(magnitude, negative, grid, rounding, shift, ~kept, random)
        rounded = (magnitude if increment is None else magnitude + increment) & kept
    if grid.smallest is None:
        return rounded
    return torch.where(
        magnitude < grid.smallest, _smallest_or_zero(magnitude, negative, grid, rounding, random), rounded
    )


def _increment(
    magnitude: Tensor,
    negative: Tensor,
    grid: Grid,
    rounding: str,
    shift: Tensor | int,
    dropped: Tensor | int,
    random: Tensor | None,
) -> Tensor | int | None:
    """What to add before the `dropped` bits are cut off."""
    if rounding == "towards_zero":
        return None
    if rounding == "plus_inf":
        return dropped & ~negative
    if rounding == "minus_inf":
        return dropped & negative
    if rounding == "odd":
        return dropped & (grid.last_bit(magnitude, shift) - 1)
    if rounding in STOCHASTIC:
        assert random is not None
        width = grid.carrier.width
        # The high bits of the generator are the best; `>> 1` first, since a shift by all bits is undefined.
        return dropped & (random >> width if rounding == "stoc_equal" else (random >> 1) >> (width - shift))
    below_half = dropped >> 1
    if rounding == "nearest_zero":
        increment = below_half
    elif rounding == "nearest_away":
        increment = below_half + 1
    else:
        last_bit = grid.last_bit(magnitude, shift)
        increment = below_half + (last_bit if rounding == "nearest" else 1 - last_bit)
    return increment & dropped if grid.least_shift == 0 else increment


def _smallest_or_zero(magnitude: Tensor, negative: Tensor, grid: Grid, rounding: str, random: Tensor | None) -> Tensor:
    """The grid's smallest positive number or 0, for magnitudes below the former. `>> width` spreads a sign bit."""
    assert grid.smallest is not None
    carrier, width = grid.carrier, grid.carrier.width
    if rounding in STOCHASTIC:
        assert random is not None
        if rounding == "stoc_equal":
            return (random >> width) & (-magnitude >> width) & grid.smallest
        exponent = (magnitude >> carrier.sig_bits).clamp(min=1)
        significand = magnitude - ((exponent - 1) << carrier.sig_bits)
        distance = (grid.smallest_exponent + carrier.bias - 1 - exponent).clamp(0, width)
        fraction = (significand << (width - carrier.sig_bits - 1)) >> distance  # of the smallest, times 2**width
        return (((random & carrier.magnitude_mask) - fraction) >> width) & grid.smallest
    goes_up = (grid.threshold(rounding) - 1 - magnitude) >> width
    if rounding == "plus_inf":
        goes_up = goes_up & ~negative
    elif rounding == "minus_inf":
        goes_up = goes_up & negative
    elif rounding == "towards_zero":
        return torch.zeros_like(magnitude)
    return goes_up & grid.smallest


def random_like(magnitude: Tensor, seed: Tensor) -> Tensor:
    """Uniform bits of the shape and integer dtype of `magnitude`, a function of the seed and the element index."""
    columns = magnitude.shape[-1] if magnitude.dim() else 1
    rows = math.prod(magnitude.shape[:-1])
    bits = random_bits.random_bits(seed, rows, columns).view(magnitude.shape)
    if magnitude.dtype is torch.int32:
        return bits
    low = random_bits.random_bits(seed ^ _SECOND_STREAM, rows, columns).view(magnitude.shape)
    return (bits.to(torch.int64) << 32) | (low.to(torch.int64) & 0xFFFFFFFF)
