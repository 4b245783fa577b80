"""Fake quantisation: values are rounded to those of a number format and stay in their dtype.

`fake_quantize` takes any format, `absmax_quantize` also gives the integers themselves, `FloatPrecisionSimulator` is the
configured callable for floating-point formats. All are deterministic given a seed, the same eager and compiled, and
straight through for gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_pass.numerics import rounding as core
from fuse_pass.numerics.formats import FloatFormat, Format, Granularity, IntFormat, as_format
from fuse_pass.numerics.spec import Site
from fuse_pass.ops.fake_quantize import OVERFLOWS
from fuse_pass.ops.fake_quantize_int import round_to_multiples
from fuse_pass.quantization.quantizers import Quantizer, quantizer_for

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
    fmt, mode = as_format(fmt), core.as_rounding(rounding)
    if subnormal is not None:
        fmt = fmt.with_subnormals(subnormal)
    granularity = Granularity(granularity) if isinstance(granularity, str) else granularity
    _check_options(fmt, scale, zero_point, overflow)
    is_dynamic = isinstance(scale, str) or (scale is None and fmt.default_scale is not None)
    quantizer = quantizer_for(fmt, mode, granularity, is_dynamic=is_dynamic, overflow=overflow, clip_grad=clip_grad)
    qparams = (scale, zero_point) if isinstance(scale, Tensor) else None
    return quantizer.fake_quantize(x, qparams, _seed_for(x, mode, seed, generator))


def quantize_at(site: Site | None, x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Tensor:
    """x as quantised at a site; x itself where there is none.

    Args:
        site: how.
        x: `[...]`.
        scale: of a calibrated site, `[]` or of the shape that the granularity tells; without it the scale is dynamic.
        zero_point: of asymmetric integers, of the same shape.

    Raises:
        ValueError: a site whose scale is "static" or "learned", and no scale.
    """
    if site is None:
        return x
    _check_floating(x, "fake_quantize")
    if scale is None and site.needs_scale:
        raise ValueError(f"the scale of {site.format.name} is {site.scale} here, and there is none")
    axis = site.granularity.axis
    # Calibrated with another number of dimensions.
    if scale is not None and axis is not None and scale.dim() != x.dim():
        shape = [1] * x.dim()
        shape[axis] = -1
        scale, zero_point = scale.view(shape), None if zero_point is None else zero_point.view(shape)
    qparams = None if scale is None else (scale, zero_point)
    seed = _seed_for(x, site.rounding, None, None)
    return quantizer_at(site, has_scale=scale is not None).fake_quantize(x, qparams, seed)


def quantizer_at(site: Site, *, has_scale: bool) -> Quantizer[Any]:
    """What rounds at a site, for which a scale was set or not."""
    return quantizer_for(
        site.format,
        site.rounding,
        site.granularity,
        is_dynamic=not has_scale and (site.scale or site.format.default_scale) is not None,
        clip_grad=site.clip_grad or site.scale == "learned",
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
    if scale is not None and not fmt.scales:
        raise ValueError(f"{fmt.name} brings its own scale; got scale={scale!r}")
    if zero_point is not None and not (fmt.takes_zero_point and isinstance(scale, Tensor)):
        raise ValueError("zero_point needs an integer format and a scale that is a tensor")
    if overflow is None:
        return
    if overflow not in OVERFLOWS:
        raise ValueError(f"unknown overflow {overflow!r}; valid are {', '.join(OVERFLOWS)}")
    if overflow == "ieee" and not fmt.has_nan:
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
