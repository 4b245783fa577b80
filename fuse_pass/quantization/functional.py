"""Fake quantisation: values are rounded to those of a number format and stay in their dtype.

`fake_quantize` takes any format, `absmax_quantize` also gives the integers themselves, `FloatPrecisionSimulator` is the
configured callable for floating-point formats. All are deterministic given a seed, the same eager and compiled, and
straight through for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuse_pass.numerics import rounding as core
from fuse_pass.numerics.formats import (
    BlockFormat,
    FixedFormat,
    FloatFormat,
    Format,
    Granularity,
    IntFormat,
    as_format,
)
from fuse_pass.numerics.spec import Site
from fuse_pass.ops.fake_quantize import OVERFLOWS
from fuse_pass.ops.fake_quantize_int import round_to_multiples

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEFT_OVER = 0x2545F4914F6CDD1D
_WEYL = -0x61C8864680B583EB  # odd, 2**64 / golden ratio: seeds of successive calls differ in many bits


def fake_quantize(
    x: Tensor,
    fmt: Format | str,
    *,
    rounding: int | str = "nearest",
    granularity: Granularity | str = "tensor",
    scale: Tensor | str | None = None,
    zero_point: Tensor | None = None,
    subnormal: bool | None = None,
    overflow: str | None = None,
    clip_grad: bool = False,
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rounds x to the numbers of a format, straight through for gradients.

    Args:
        x: `[...]`, float16, bfloat16, float32 or float64; the result has its shape and dtype.
        fmt: a format or its name in `formats`.
        rounding: mode by number or name.
        granularity: which elements share a scale, where there is one; blocks bring their own.
        scale: None: floating and fixed point are not scaled, integers by "absmax". "absmax": the largest magnitude of
            each group becomes the largest number of the format. A tensor, real value of one step (for floating point:
            of 1), of the shape that `Granularity` tells; for integers it has a gradient.
        zero_point: integer that stands for 0, with a scale that is a tensor.
        subnormal: overrides that of a floating-point format.
        overflow: of floating point: "ieee" (to infinity, or NaN in a format without, from the midpoint on) or
            "saturate"; by default "saturate" where the format has no infinity. All other formats saturate.
        clip_grad: the gradient is zero where x lies beyond the range of the format; not with "absmax", where none does.
        seed: 63-bit integer or 0-d int64 tensor for the stochastic modes; the same one gives the same result.
        generator: draws the seed, where none is given; by default it follows `torch.manual_seed`.

    Where the scale comes from x, NaN and infinities in a group leave no scale: the whole group, or block, is NaN, and
    other groups are as without it. Without a scale, or with one that is given, each element stands for itself: NaN
    stays NaN, and an infinity stays or becomes the largest number. Gradients pass straight through in any case.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: unknown format, mode, granularity, overflow or a combination without meaning.
    """
    _check_floating(x, "fake_quantize")
    fmt, rounding = as_format(fmt), core.as_rounding(rounding)
    granularity = Granularity(granularity) if isinstance(granularity, str) else granularity
    _check_options(fmt, scale, zero_point, overflow)
    drawn = _seed_for(x, rounding, seed, generator)
    if isinstance(fmt, FixedFormat):
        return _round_fixed(x, fmt, rounding, clip_grad, drawn)
    if isinstance(fmt, FloatFormat) and scale is None:
        return _round_float(x, fmt, rounding, subnormal, overflow, clip_grad, drawn)
    if x.numel() == 0:
        return x.clone()

    def quantize(
        x: Tensor, dims: tuple[int, ...], scale: Any, zero_point: Tensor | None, seed: Tensor | None
    ) -> Tensor:
        """Elements that differ along `dims` share a scale."""
        given = isinstance(scale, Tensor)
        if isinstance(fmt, BlockFormat):
            return _round_blocks(x, fmt, rounding, seed)
        if isinstance(fmt, FloatFormat):
            factor = scale if given else _absmax(x, dims, fmt.max)
            clips = clip_grad and given
            return _round_scaled_float(x, factor, fmt, rounding, subnormal, overflow or "saturate", clips, seed)
        assert isinstance(fmt, IntFormat)
        if not given:
            scale, zero_point = _int_scale(x, dims, fmt)
        return torch.ops.fuse_pass.fake_quantize_int(  # type: ignore[no-any-return]
            x, scale, zero_point, seed, fmt.quant_min, fmt.quant_max, rounding, clip_grad and given
        )

    size = fmt.block_size if isinstance(fmt, BlockFormat) else granularity.size
    if size is None:
        return quantize(x, _shared_dims(x, granularity), scale, zero_point, drawn)
    return _by_groups(quantize, x, size, scale, zero_point, drawn)


def quantize_at(site: Site | None, x: Tensor) -> Tensor:
    """x as a `Site` without a scale of its own quantises it; x itself where there is none."""
    if site is None:
        return x
    return fake_quantize(
        x,
        site.format,
        rounding=site.rounding,
        granularity=site.granularity,
        scale="absmax" if site.scale == "dynamic" else None,
        clip_grad=site.clip_grad,
    )


def absmax_quantize(x: Tensor, bits: int = 8, *, dim: int | tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric integers by the largest magnitude: Q = 2^(bits−1) − 1, s = max|x|, quant = clamp(round(x·Q/s), −Q, Q).

    Args:
        x: `[...]`, floating point.
        bits: 2…16.
        dim: the maximum is over these dimensions, by default over all.

    Returns:
        quant: int8 (int16 for more than 8 bits) `[...]`.
        dequant: quant·s/Q in x's dtype `[...]`, straight through for gradients; zeros where s = 0.

    Raises:
        TypeError: x is no floating-point tensor, or bits is no integer.
        ValueError: bits out of range, or (eagerly) NaN or infinity in x.
    """
    _check_floating(x, "absmax_quantize")
    levels = IntFormat(bits).quant_max
    int_dtype = torch.int8 if bits <= 8 else torch.int16
    if x.numel() == 0:
        return x.to(int_dtype), x.clone()
    carrier = core.compute_carrier(x.dtype)
    wide = x.detach().to(carrier.dtype)
    dims = tuple(range(x.dim())) if dim is None else (dim,) if isinstance(dim, int) else dim
    absmax = wide.abs().amax(dims, keepdim=True)
    if not torch.compiler.is_compiling() and not torch.isfinite(absmax).all():
        raise ValueError("absmax_quantize: x holds NaN or infinity, from which no scale can be taken")
    # x·Q and quant·s must not overflow: beyond 2^64 all is done with s and x a power of two smaller, which is exact.
    shrink = torch.where(absmax > 2.0**64, 2.0**-32, 1.0).to(carrier.dtype)
    small = absmax * shrink
    ratio = (wide * shrink) * levels / torch.where(absmax == 0, 1.0, small)
    rounded = round_to_multiples(ratio, carrier, 0, "nearest").clamp(-levels, levels)
    dequant = (rounded * small / levels / shrink).to(x.dtype)
    return rounded.to(int_dtype), torch.ops.fuse_pass.straight_through(x, dequant)


class FloatPrecisionSimulator:
    """Rounds tensors to an IEEE-style floating-point format: top exponent for infinity and NaN, gradual underflow.

    Args:
        exp_bits: bits of the exponent, 2…11.
        sig_bits: explicit fraction bits, 1…52; (5, 10) is float16, (8, 7) bfloat16.
        rmode: rounding mode, by number 0…9 or name.
        subnormal: whether there are numbers below the smallest normal one.
        overflow: "ieee" or "saturate", which stops at the largest finite number.
        generator_seed: makes the stochastic modes a function of this seed and of how often this object was called;
            by default they follow `torch.manual_seed`.

    Raises:
        TypeError: bits that are no integers.
        ValueError: bits out of range, unknown mode or overflow.
    """

    def __init__(
        self,
        exp_bits: int,
        sig_bits: int,
        rmode: int | str = 1,
        *,
        subnormal: bool = True,
        overflow: str = "ieee",
        generator_seed: int | None = None,
    ) -> None:
        self.format = FloatFormat(exp_bits, sig_bits, subnormal=subnormal)
        self.rounding = core.as_rounding(rmode)
        _check_options(self.format, None, None, overflow)
        self.overflow = overflow
        # A tensor, so that a compiled call can move it on without being compiled again.
        self._next_seed = None if generator_seed is None else torch.tensor(generator_seed, dtype=torch.int64)

    @property
    def exp_bits(self) -> int:
        return self.format.exp_bits

    @property
    def sig_bits(self) -> int:
        return self.format.sig_bits

    @property
    def rmode(self) -> int:
        """Number of the rounding mode."""
        return core.ROUNDINGS.index(self.rounding)

    def quantize(self, x: Tensor) -> Tensor:
        """`x [...]` rounded, in its dtype; straight through for gradients."""
        seed = None
        if self._next_seed is not None and self.rounding in core.STOCHASTIC:
            seed = torch.ops.fuse_pass.taken_seed(self._next_seed, device=x.device)
            self._next_seed.add_(_WEYL)
        return fake_quantize(x, self.format, rounding=self.rounding, overflow=self.overflow, seed=seed)

    __call__ = quantize

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.exp_bits}, {self.sig_bits}, {self.rounding!r}, overflow={self.overflow!r})"


def _check_floating(x: Any, what: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{what}: expected a tensor of float16, bfloat16, float32 or float64, got {got}")


def _check_options(fmt: Format, scale: Any, zero_point: Any, overflow: str | None) -> None:
    if isinstance(scale, str) and scale != "absmax":
        raise ValueError(f"scale is a tensor, None or 'absmax', got {scale!r}")
    if scale is not None and isinstance(fmt, (BlockFormat, FixedFormat)):
        raise ValueError(f"{fmt.name} brings its own scale; got scale={scale!r}")
    if zero_point is not None and not (isinstance(fmt, IntFormat) and isinstance(scale, Tensor)):
        raise ValueError("zero_point needs an integer format and a scale that is a tensor")
    if overflow is None:
        return
    if overflow not in OVERFLOWS:
        raise ValueError(f"unknown overflow {overflow!r}; valid are {', '.join(OVERFLOWS)}")
    if overflow == "ieee" and not (isinstance(fmt, FloatFormat) and fmt.has_nan):
        raise ValueError(f"{fmt.name} has neither infinity nor NaN: it can only saturate")


def _seed_for(x: Tensor, rounding: str, seed: Tensor | int | None, generator: torch.Generator | None) -> Tensor | None:
    if rounding not in core.STOCHASTIC:
        return None
    if isinstance(seed, Tensor):
        return seed
    if seed is not None:
        return torch.full((), seed, dtype=torch.int64, device=x.device)
    if generator is not None:
        return torch.randint(2**63 - 1, (), generator=generator, device=generator.device).to(x.device)
    return torch.ops.fuse_pass.seed(device=x.device)  # type: ignore[no-any-return]


def _round_float(
    x: Tensor,
    fmt: FloatFormat,
    rounding: str,
    subnormal: bool | None,
    overflow: str | None,
    clip_grad: bool,
    seed: Tensor | None,
) -> Tensor:
    return torch.ops.fuse_pass.fake_quantize(  # type: ignore[no-any-return]
        x,
        seed,
        fmt.exp_bits,
        fmt.sig_bits,
        fmt.bias,
        fmt.encoding,
        rounding,
        fmt.subnormal if subnormal is None else subnormal,
        overflow or ("ieee" if fmt.has_inf else "saturate"),
        clip_grad,
    )


def _round_scaled_float(
    x: Tensor,
    scale: Tensor,
    fmt: FloatFormat,
    rounding: str,
    subnormal: bool | None,
    overflow: str,
    clip_grad: bool,
    seed: Tensor | None,
) -> Tensor:
    wide = core.compute_carrier(x.dtype).dtype
    step = scale.detach().to(wide)
    ratio = x.detach().to(wide) / step
    y = _round_float(ratio, fmt, rounding, subnormal, overflow, False, seed)
    clipped = ratio if clip_grad else None
    return torch.ops.fuse_pass.straight_through(x, (y * step).to(x.dtype), clipped, -fmt.max, fmt.max)  # type: ignore[no-any-return]


def _round_fixed(x: Tensor, fmt: FixedFormat, rounding: str, clip_grad: bool, seed: Tensor | None) -> Tensor:
    step = torch.full((), fmt.quantum, dtype=core.compute_carrier(x.dtype).dtype, device=x.device)
    low, high = (_held(int(end / fmt.quantum), x.dtype) for end in (fmt.min, fmt.max))
    return torch.ops.fuse_pass.fake_quantize_int(x, step, None, seed, low, high, rounding, clip_grad)  # type: ignore[no-any-return]


def _held(number: int, dtype: torch.dtype) -> int:
    """The integer next to `number`, towards zero, that `dtype` holds."""
    surplus = max(abs(number).bit_length() - 1 - core.fraction_bits(dtype), 0)
    magnitude = abs(number) >> surplus << surplus
    return magnitude if number > 0 else -magnitude


def _round_blocks(x: Tensor, fmt: BlockFormat, rounding: str, seed: Tensor | None) -> Tensor:
    """`x [..., blocks, elements]`; OCP MX 1.0 §6.3: scale 2^(floor(log2 max|x|) − element.emax), within its format."""
    carrier = core.compute_carrier(x.dtype)
    blocks = x.detach().to(carrier.dtype)
    largest = blocks.abs().amax(-1, keepdim=True)
    exponent = (largest.view(carrier.int_dtype) >> carrier.sig_bits) - carrier.bias
    exponent = (exponent - fmt.element.emax).clamp(fmt.scale.emin, fmt.scale.emax)
    # Two factors, because the inverse of the largest scale is no normal number.
    half = exponent >> 1
    up, up_again = (_power_of_two(e, carrier) for e in (half, exponent - half))
    up = torch.where(largest < math.inf, up, math.nan)  # where no scale can be taken, it is NaN, and the block is
    down, down_again = (_power_of_two(-e, carrier) for e in (half, exponent - half))
    ratio = blocks * down * down_again
    if rounding in ("plus_inf", "minus_inf", "odd"):  # what vanished in the product has yet to go to its neighbour
        vanished = (ratio == 0) & (blocks != 0)
        ratio = torch.where(vanished, blocks.sign() * torch.finfo(carrier.dtype).tiny, ratio)
    if isinstance(fmt.element, FixedFormat):
        element = _round_fixed(ratio, fmt.element, rounding, False, seed)
    else:
        element = _round_float(ratio, fmt.element, rounding, None, "saturate", False, seed)
    return torch.ops.fuse_pass.straight_through(x, (element * up * up_again).to(x.dtype))  # type: ignore[no-any-return]


def _power_of_two(exponent: Tensor, carrier: core.Carrier) -> Tensor:
    return ((exponent + carrier.bias) << carrier.sig_bits).view(carrier.dtype)


def _shared_dims(x: Tensor, granularity: Granularity) -> tuple[int, ...]:
    """The dimensions along which elements share a scale; not for groups."""
    every = tuple(range(x.dim()))
    if granularity.kind == "tensor":
        return every
    if granularity.kind == "token":
        return every[-1:]
    axis = granularity.axis
    assert axis is not None
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"granularity 'channel' with axis {axis} for a tensor of {x.dim()} dimensions")
    return tuple(dim for dim in every if dim != axis % x.dim())


def _by_groups(
    quantize: Callable[[Tensor, tuple[int, ...], Any, Tensor | None, Tensor | None], Tensor],
    x: Tensor,
    size: int,
    scale: Any,
    zero_point: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """The groups of `size` and then the shorter one that is left over.

    Not by padding: Inductor computes a padded value once for every use of it, and its C++ for a slice of flattened
    groups leaves the last one out (torch 2.13).
    """
    rows = x.reshape(1) if x.dim() == 0 else x
    left_over = rows.shape[-1] % size
    groups = rows.shape[-1] // size
    parts = []
    for start, count, length in ((0, groups, size), (groups, 1, left_over)):
        if count and length:
            part = rows[..., start * size : start * size + count * length].unflatten(-1, (count, length))
            step, zero = (
                q[..., start : start + count, :] if isinstance(q, Tensor) and q.dim() > 1 else q
                for q in (scale, zero_point)
            )
            stream = seed if start == 0 or seed is None else seed ^ _LEFT_OVER
            parts.append(quantize(part, (-1,), step, zero, stream).flatten(-2))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y[0] if x.dim() == 0 else y


def _absmax(x: Tensor, dims: tuple[int, ...], largest: float) -> Tensor:
    """The scale that makes the largest magnitude the largest number; 1 for zeros and for what would underflow."""
    wide = x.detach().to(core.compute_carrier(x.dtype).dtype).abs()
    scale = (wide.amax(dims, keepdim=True) if dims else wide) / largest
    return torch.where(scale == 0, 1.0, scale)


def _int_scale(x: Tensor, dims: tuple[int, ...], fmt: IntFormat) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point from the range of x."""
    if fmt.symmetric:
        return _absmax(x, dims, fmt.quant_max), None
    wide = x.detach().to(core.compute_carrier(x.dtype).dtype)
    return affine_scale(
        *((wide.amin(dims, keepdim=True), wide.amax(dims, keepdim=True)) if dims else (wide, wide)), fmt
    )


def affine_scale(low: Tensor, high: Tensor, fmt: IntFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point with which asymmetric integers span low … high and 0, which stays exact."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = fmt.quant_max - fmt.quant_min
    scale = high / steps - low / steps  # the difference itself could overflow
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, (fmt.quant_min - torch.round(low / scale)).clamp(fmt.quant_min, fmt.quant_max)
