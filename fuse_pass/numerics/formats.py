"""Number formats: one frozen row each, by name in `formats`.

    value = ± 1.f × 2^e      emin <= e <= emax, f of `sig_bits` bits      normal
    value = ± 0.f × 2^emin                                                subnormal

Sources: IEEE 754-2019 (binary formats), OCP OFP8 1.0 (e4m3, e5m2), OCP MX 1.0 (fp6, fp4, e8m0, blocks), 2206.02915
(the two fnuz formats). To add a format is to add a row to `_ROWS`.

A row tells what sets its kind apart: where its scales come from, and which scale fits a range of numbers. How tensors
are rounded to it is in `quantization.quantizers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

QParams = tuple[Tensor, Tensor | None]
"""The scale (real value of one step), and the zero point (the integer that stands for 0) where there is one."""

ENCODINGS = ("ieee", "fn", "fnuz", "finite", "scale")
"""What the codes with the largest exponent mean, and zero.

    ieee    infinities and NaNs
    fn      numbers, but for the last code of each sign, which is NaN; no infinity (OCP e4m3)
    fnuz    numbers; the code of -0 is the only NaN; no infinity and no negative zero
    finite  numbers; neither infinity nor NaN (OCP fp6, fp4)
    scale   unsigned powers of two without a zero; the last code is NaN (OCP e8m0)
"""


def _integer(what: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{what} must lie in {low}…{high}, got {value}")


class Format:
    """What every kind of format answers.

    Attributes:
        name: for messages and tables; formats compare without it.
        scales: where the scale of a tensor may come from (`Site.scale`); nowhere if the format brings its own.
        default_scale: where it comes from if nothing is said; None for a format that means numbers without one.
        takes_zero_point: whether a zero point may be given together with a scale.
    """

    name: str
    scales: ClassVar[tuple[str, ...]] = ()
    default_scale: ClassVar[str | None] = None
    takes_zero_point: ClassVar[bool] = False

    @property
    def has_nan(self) -> bool:
        """Whether there is a code for NaN, or for infinity."""
        return False

    @property
    def has_zero_point(self) -> bool:
        """Whether every scale comes with a zero point."""
        return False

    @property
    def steps(self) -> float:
        """What the largest magnitude is divided by to give the scale; with a zero point, what the range is."""
        raise ValueError(f"{self.name} brings its own scale")

    def scale_for(self, largest: Tensor) -> Tensor:
        """The scale that makes this magnitude the largest number; 1 for zeros and for what would underflow."""
        scale = largest / self.steps
        return torch.where(scale == 0, 1.0, scale)

    def qparams_for(self, low: Tensor, high: Tensor) -> QParams:
        """The scale, and zero point if there is one, with which the numbers span low … high.

        Raises:
            ValueError: a format that brings its own scale.
        """
        return self.scale_for(torch.maximum(low.abs(), high.abs())), None

    def with_subnormals(self, subnormal: bool) -> Self:
        """The format with or without subnormal numbers, where it can have them."""
        return self


@dataclass(frozen=True)
class FloatFormat(Format):
    """A binary floating-point format.

    Args:
        exp_bits: bits of the exponent field, 2…11.
        sig_bits: explicit fraction bits, 1…52 (0 for the encoding "scale" alone).
        bias: exponent bias; by default 2^(exp_bits - 1) - 1, for fnuz one more.
        subnormal: whether there are numbers between 0 and the smallest normal one.
        encoding: one of `ENCODINGS`.
        name: for messages and tables; formats compare without it.

    Raises:
        TypeError: bits that are no integers.
        ValueError: bits or bias out of range; the message says what is valid.
    """

    scales = ("dynamic", "static")

    exp_bits: int
    sig_bits: int
    _: KW_ONLY
    bias: int = None  # type: ignore[assignment]  # replaced below, so that a format always has one
    subnormal: bool = True
    encoding: str = "ieee"
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"unknown encoding {self.encoding!r}; valid are {', '.join(ENCODINGS)}")
        _integer("exp_bits", self.exp_bits, 2, 11)
        scale = self.encoding == "scale"
        _integer("sig_bits", self.sig_bits, 0 if scale else 1, 0 if scale else 52)
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (self.exp_bits - 1) - (self.encoding != "fnuz"))
        _integer("bias", self.bias, -1023, 1074)
        if self.emin < -1022 or self.emax > 1023:
            raise ValueError(
                f"exponents {self.emin}…{self.emax} of FloatFormat({self.exp_bits}, {self.sig_bits}, bias={self.bias}, "
                f"encoding={self.encoding!r}) do not fit float64, whose normal exponents are -1022…1023"
            )
        if not self.name:
            suffix = "" if self.encoding == "ieee" else self.encoding
            object.__setattr__(self, "name", f"e{self.exp_bits}m{self.sig_bits}{suffix}")

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.signed + self.exp_bits + self.sig_bits

    @property
    def signed(self) -> bool:
        return self.encoding != "scale"

    @property
    def has_inf(self) -> bool:
        return self.encoding == "ieee"

    @property
    def has_nan(self) -> bool:
        return self.encoding != "finite"

    @property
    def has_negative_zero(self) -> bool:
        return self.encoding not in ("fnuz", "scale")

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number."""
        return (1 if self.signed else 0) - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest number."""
        return int(2**self.exp_bits) - 1 - (self.encoding in ("ieee", "scale")) - self.bias

    @property
    def max(self) -> float:
        """The largest finite number."""
        return math.ldexp(2 ** (self.sig_bits + 1) - (2 if self.encoding == "fn" else 1), self.emax - self.sig_bits)

    @property
    def steps(self) -> float:
        return self.max

    @property
    def smallest_normal(self) -> float:
        return math.ldexp(1.0, self.emin)

    @property
    def smallest_subnormal(self) -> float:
        """The distance of neighbours below the smallest normal number; that number itself without subnormals."""
        return math.ldexp(1.0, self.emin - self.sig_bits) if self.subnormal else self.smallest_normal

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number of infinite exponent range."""
        return math.ldexp(1.0, -self.sig_bits)

    def with_subnormals(self, subnormal: bool) -> Self:
        return replace(self, subnormal=subnormal)


@dataclass(frozen=True)
class IntFormat(Format):
    """Integers times a scale: `bits` 2…16; symmetric −Q…Q with Q = 2^(bits−1) − 1, else −Q−1…Q with a zero point."""

    scales = ("dynamic", "static", "learned")
    default_scale = "dynamic"
    takes_zero_point = True

    bits: int
    symmetric: bool = True
    _: KW_ONLY
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _integer("bits", self.bits, 2, 16)
        if not self.name:
            object.__setattr__(self, "name", f"int{self.bits}" + ("" if self.symmetric else "_asymmetric"))

    @property
    def quant_max(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    @property
    def quant_min(self) -> int:
        return -self.quant_max - (not self.symmetric)

    @property
    def has_zero_point(self) -> bool:
        return not self.symmetric

    @property
    def steps(self) -> int:
        return self.quant_max if self.symmetric else self.quant_max - self.quant_min

    def qparams_for(self, low: Tensor, high: Tensor) -> QParams:
        """With a zero point the range is widened to 0, which stays exact."""
        if self.symmetric:
            return super().qparams_for(low, high)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = high / self.steps - low / self.steps  # the difference itself could overflow
        scale = torch.where(scale == 0, 1.0, scale)
        return scale, (self.quant_min - torch.round(low / scale)).clamp(self.quant_min, self.quant_max)


@dataclass(frozen=True)
class FixedFormat(Format):
    """Fixed point: multiples of 2^−frac_bits in two's complement, −2^int_bits … 2^int_bits − 2^−frac_bits.

    Args:
        int_bits: bits before the binary point without the sign, 0…31.
        frac_bits: bits after it, 0…31.
        symmetric: leave the most negative number out.
    """

    int_bits: int
    frac_bits: int
    _: KW_ONLY
    symmetric: bool = False
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _integer("int_bits", self.int_bits, 0, 31)
        _integer("frac_bits", self.frac_bits, 0, 31)
        if self.int_bits + self.frac_bits == 0:
            raise ValueError("int_bits and frac_bits are both 0: no number but 0 and -1")
        if not self.name:
            object.__setattr__(self, "name", f"fixed{self.int_bits}_{self.frac_bits}")

    @property
    def bits(self) -> int:
        return 1 + self.int_bits + self.frac_bits

    @property
    def quantum(self) -> float:
        """The distance of neighbours."""
        return math.ldexp(1.0, -self.frac_bits)

    @property
    def max(self) -> float:
        return math.ldexp(1.0, self.int_bits) - self.quantum

    @property
    def min(self) -> float:
        return -self.max if self.symmetric else -math.ldexp(1.0, self.int_bits)

    @property
    def emax(self) -> int:
        """Exponent of the largest number."""
        return self.int_bits - 1


@dataclass(frozen=True)
class BlockFormat(Format):
    """Elements that share a power of two as their scale, `block_size` neighbours along the last dimension each.

    The scale of OCP MX 1.0 §6.3: 2^(floor(log2 max|x|) − element.emax), and elements beyond the range saturate. A block
    that holds NaN or an infinity gets the scale NaN (§5.4.1), and all of it is NaN, as in microxcaling and torchao:
    from such a maximum there is no scale at which the finite elements would be right.

    Args:
        element: format of each element.
        block_size: elements per scale.
        scale: format of the scales, of encoding "scale".
    """

    element: FloatFormat | FixedFormat
    block_size: int
    scale: FloatFormat = FloatFormat(8, 0, encoding="scale", name="e8m0")
    _: KW_ONLY
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _integer("block_size", self.block_size, 1, 2**31 - 1)
        if not isinstance(self.element, (FloatFormat, FixedFormat)):
            raise TypeError(f"the element of a block is a FloatFormat or a FixedFormat, got {self.element!r}")
        if not isinstance(self.scale, FloatFormat) or self.scale.signed:
            raise TypeError(f"the scale of a block is a FloatFormat of encoding 'scale', got {self.scale!r}")
        if not self.name:
            object.__setattr__(self, "name", f"block{self.block_size}_{self.element.name}")

    @property
    def bits(self) -> float:
        """Bits per element, its part of the scale included."""
        return self.element.bits + self.scale.bits / self.block_size


GRANULARITIES = ("tensor", "channel", "group", "token")


@dataclass(frozen=True)
class Granularity:
    """Which elements share a scale.

        tensor   all
        channel  those with the same index along `axis`
        group    `size` neighbours along the last dimension; the last group may be shorter
        token    a row: those that differ in the last index alone

    Scales have the shape of x with the shared dimensions 1; for groups `[..., groups, 1]`.
    """

    kind: str = "tensor"
    _: KW_ONLY
    axis: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in GRANULARITIES:
            raise ValueError(f"unknown granularity {self.kind!r}; valid are {', '.join(GRANULARITIES)}")
        if self.kind == "channel":
            if self.axis is None:
                object.__setattr__(self, "axis", 0)
            _integer("axis", self.axis, -64, 63)
        elif self.axis is not None:
            raise ValueError(f"only granularity 'channel' has an axis, not {self.kind!r}")
        if self.kind == "group":
            _integer("size (elements of a group)", self.size, 1, 2**31 - 1)
        elif self.size is not None:
            raise ValueError(f"only granularity 'group' has a size, not {self.kind!r}")

    def shared_dims(self, rank: int) -> tuple[int, ...]:
        """The dimensions along which elements share a scale; for groups the last one of x as `[..., groups, size]`.

        Raises:
            ValueError: a channel that tensors of this rank do not have.
        """
        if self.kind == "tensor":
            return tuple(range(rank))
        if self.axis is None:
            return (-1,) if rank else ()
        if not -rank <= self.axis < rank:
            raise ValueError(f"granularity 'channel' with axis {self.axis} for a tensor of {rank} dimensions")
        return tuple(dim for dim in range(rank) if dim != self.axis % rank)


class _Table(Mapping[str, Format]):
    """Read-only; an unknown name is answered with the known ones."""

    def __init__(self, rows: tuple[Format, ...]) -> None:
        self._rows = {row.name: row for row in rows}

    def __getitem__(self, name: str) -> Format:
        try:
            return self._rows[name]
        except (KeyError, TypeError):
            raise UnknownFormatError(f"unknown format {name!r}; valid names are {', '.join(self._rows)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class UnknownFormatError(KeyError, ValueError):
    """A name that is not in `formats`: a ValueError for callers, a KeyError for what treats it as a mapping."""

    def __str__(self) -> str:
        return str(self.args[0])


_FP8_E4M3 = FloatFormat(4, 3, encoding="fn", name="fp8_e4m3")
_FP8_E5M2 = FloatFormat(5, 2, name="fp8_e5m2")
_FP6_E2M3 = FloatFormat(2, 3, encoding="finite", name="fp6_e2m3")
_FP6_E3M2 = FloatFormat(3, 2, encoding="finite", name="fp6_e3m2")
_FP4_E2M1 = FloatFormat(2, 1, encoding="finite", name="fp4_e2m1")

_ROWS: tuple[Format, ...] = (
    FloatFormat(11, 52, name="fp64"),
    FloatFormat(8, 23, name="fp32"),
    FloatFormat(8, 10, name="tf32"),
    FloatFormat(5, 10, name="fp16"),
    FloatFormat(8, 7, name="bf16"),
    _FP8_E4M3,
    _FP8_E5M2,
    FloatFormat(4, 3, encoding="fnuz", name="fp8_e4m3fnuz"),
    FloatFormat(5, 2, encoding="fnuz", name="fp8_e5m2fnuz"),
    _FP6_E2M3,
    _FP6_E3M2,
    _FP4_E2M1,
    FloatFormat(8, 0, encoding="scale", name="e8m0"),
    *(IntFormat(bits) for bits in range(2, 17)),
    *(IntFormat(bits, symmetric=False) for bits in range(2, 17)),
    FixedFormat(3, 4),
    FixedFormat(7, 8),
    FixedFormat(15, 16),
    BlockFormat(_FP8_E4M3, 32, name="mxfp8"),
    BlockFormat(_FP8_E4M3, 32, name="mxfp8_e4m3"),
    BlockFormat(_FP8_E5M2, 32, name="mxfp8_e5m2"),
    BlockFormat(_FP6_E2M3, 32, name="mxfp6"),
    BlockFormat(_FP6_E2M3, 32, name="mxfp6_e2m3"),
    BlockFormat(_FP6_E3M2, 32, name="mxfp6_e3m2"),
    BlockFormat(_FP4_E2M1, 32, name="mxfp4"),
    BlockFormat(FixedFormat(1, 6, symmetric=True, name="mxint8_element"), 32, name="mxint8"),
    BlockFormat(FixedFormat(1, 2, symmetric=True, name="bfp_element"), 16, name="bfp"),  # MSFP12
)

formats: Mapping[str, Format] = _Table(_ROWS)
"""Every named format; an unknown name raises an error that lists them all."""


def as_format(spec: Format | str) -> Format:
    """The format itself or the one of that name.

    Raises:
        UnknownFormatError: a ValueError and KeyError, for a name that is not in `formats`.
        TypeError: neither a name nor a format.
    """
    if isinstance(spec, str):
        return formats[spec]
    if isinstance(spec, Format):
        return spec
    raise TypeError(f"expected a format or its name, got {spec!r}")
