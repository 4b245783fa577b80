"""What rounding must give, written without torch and without the bit arithmetic of the package.

`Table` enumerates every number of a format from its codes and rounds by search in that list; comparisons and midpoints
of such numbers are exact in float64. `exact_round` does one number in rationals, for formats too large to enumerate.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from fuse_pass.numerics.formats import FloatFormat

DETERMINISTIC = (
    "nearest_odd",
    "nearest",
    "plus_inf",
    "minus_inf",
    "towards_zero",
    "nearest_zero",
    "nearest_away",
    "odd",
)


def _decode(code: int, fmt: FloatFormat) -> Fraction:
    """The magnitude of a code without its sign; codes past the last one continue with larger exponents."""
    exponent, fraction = code >> fmt.sig_bits, code & (2**fmt.sig_bits - 1)
    if fmt.encoding == "scale":
        return Fraction(2) ** (exponent - fmt.bias)
    quantum = Fraction(2) ** (1 - fmt.bias - fmt.sig_bits)
    if exponent == 0:
        return fraction * quantum
    return (2**fmt.sig_bits + fraction) * quantum * 2 ** (exponent - 1)


def _last_code(fmt: FloatFormat) -> int:
    codes = 2 ** (fmt.exp_bits + fmt.sig_bits)
    unused = {"ieee": 2**fmt.sig_bits, "fn": 1, "fnuz": 0, "finite": 0, "scale": 1}[fmt.encoding]
    return codes - unused - 1


def _goes_up(mode: str, negative: bool, exact: bool, versus_half: int, odd_below: bool) -> bool:
    """Whether the magnitude goes to the neighbour above; `versus_half` is the sign of its distance to the middle."""
    if exact:
        return False
    return {
        "nearest_odd": versus_half > 0 or (versus_half == 0 and not odd_below),
        "nearest": versus_half > 0 or (versus_half == 0 and odd_below),
        "plus_inf": not negative,
        "minus_inf": negative,
        "towards_zero": False,
        "nearest_zero": versus_half > 0,
        "nearest_away": versus_half >= 0,
        "odd": not odd_below,
    }[mode]


def _beyond(mode: str, negative: bool, fmt: FloatFormat, overflow: str) -> float:
    """The magnitude of what has overflowed."""
    to_largest = mode in ("towards_zero", "odd") or mode == ("plus_inf" if negative else "minus_inf")
    if overflow == "saturate" or to_largest:
        return float(_decode(_last_code(fmt), fmt))
    return float("inf") if fmt.encoding == "ieee" else float("nan")


def exact_round(x: float, fmt: FloatFormat, mode: str, subnormal: bool = True, overflow: str = "ieee") -> float:
    """One finite number of a signed format, by integers and fractions."""
    magnitude, negative = abs(Fraction(x)), str(x).startswith("-")
    emin = 1 - fmt.bias
    exponent = emin
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    quantum = Fraction(2) ** (exponent - fmt.sig_bits)
    below, rest = divmod(magnitude, quantum)
    versus_half = (rest * 2 > quantum) - (rest * 2 < quantum)
    result = (below + _goes_up(mode, negative, rest == 0, versus_half, below % 2 == 1)) * quantum
    smallest = Fraction(2) ** emin
    if not subnormal and 0 < magnitude < smallest:
        if mode.startswith("nearest"):  # chop: from half of the smallest normal number on
            up = result > smallest / 2 if mode == "nearest_zero" else result >= smallest / 2
        else:
            up = mode == "odd" or mode == ("minus_inf" if negative else "plus_inf")
        result = smallest if up else Fraction(0)
    beyond = result > _decode(_last_code(fmt), fmt)
    value = _beyond(mode, negative, fmt, overflow) if beyond else float(result)
    return -value if negative else value


class Table:
    """Every number of a format: `values` ascending, of which the first `finite` are not beyond the largest."""

    def __init__(self, fmt: FloatFormat) -> None:
        self.fmt = fmt
        last = _last_code(fmt)
        end = (2**fmt.exp_bits << fmt.sig_bits) + 2
        self.finite = last + 1
        self.values = np.array([float(_decode(code, fmt)) for code in range(end)])
        assert (np.diff(self.values) > 0).all()

    @property
    def magnitudes(self) -> np.ndarray:
        """The finite numbers of the format that are not negative."""
        return self.values[: self.finite]

    def round(self, x: np.ndarray, mode: str, subnormal: bool = True, overflow: str = "ieee") -> np.ndarray:
        """float64 of the same shape; `x` holds float64, which may be infinite or NaN."""
        negative, magnitude = np.signbit(x), np.abs(x)
        finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
        below = np.clip(np.searchsorted(self.values, finite, side="right") - 1, 0, len(self.values) - 2)
        low, high = self.values[below], self.values[below + 1]
        half = low / 2 + high / 2
        up = np.zeros(x.shape, bool)
        for sign in (False, True):
            for parity in (False, True):
                for versus_half in (-1, 0, 1):
                    chosen = (negative == sign) & (below % 2 == parity) & (np.sign(finite - half) == versus_half)
                    up |= chosen & _goes_up(mode, sign, False, versus_half, parity)
        result = np.where((finite > low) & up, high, low)
        if not subnormal:
            result = self._flush(result, finite, negative, mode)
        beyond = np.where(negative, *(_beyond(mode, sign, self.fmt, overflow) for sign in (True, False)))
        result = np.where((result > self.values[self.finite - 1]) | (finite >= self.values[-1]), beyond, result)
        infinite = np.inf if self.fmt.encoding == "ieee" else _beyond("nearest", False, self.fmt, overflow)
        result = np.where(np.isinf(x), infinite, np.where(np.isnan(x), np.nan, result))
        if self.fmt.encoding == "fnuz":
            negative = negative & (result != 0)
        return np.where(negative, -result, result)

    def _flush(self, rounded: np.ndarray, magnitude: np.ndarray, negative: np.ndarray, mode: str) -> np.ndarray:
        smallest = self.values[2**self.fmt.sig_bits]
        if mode == "nearest_zero":
            up = rounded > smallest / 2
        elif mode.startswith("nearest"):
            up = rounded >= smallest / 2
        elif mode == "towards_zero":
            up = np.zeros(rounded.shape, bool)
        else:
            up = np.full(rounded.shape, True) if mode == "odd" else negative == (mode == "minus_inf")
        tiny = magnitude < smallest
        return np.where(tiny, np.where(up & (magnitude > 0), smallest, 0.0), rounded)
