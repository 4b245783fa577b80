"""One quantizer per kind of number format: rounds tensors to its numbers, straight through for gradients.

    FloatQuantizer   y = round(x), with a scale round(x / s) · s
    FixedQuantizer   y = clamp(round(x / quantum)) · quantum
    IntQuantizer     y = (clamp(round(x / s) + z) − z) · s
    BlockQuantizer   y = round(x / s) · s, s = 2^(floor(log2 max|block|) − element.emax)          OCP MX 1.0 §6.3

x and y `[...]`, in the same dtype; computed in float32 (float64 for float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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
    QParams,
)

_LEFT_OVER = 0x2545F4914F6CDD1D

FormatT = TypeVar("FormatT", bound=Format)


@dataclass(frozen=True)
class Quantizer(Generic[FormatT]):
    """How tensors are rounded to one format.

    Args:
        format: to whose numbers.
        rounding: name of the rounding mode.
        granularity: which elements share a scale.
        is_dynamic: whether scales are taken from each tensor.
        overflow: of floating point: "ieee" or "saturate". None: "saturate", but without a scale "ieee" for a format
            with infinities. All other formats saturate.
        clip_grad: whether the gradient is 0 where x lies beyond the range of the format.
    """

    format: FormatT
    rounding: str
    granularity: Granularity  # without a default, which Dynamo of PyTorch 2.11 could not read
    is_dynamic: bool = False
    overflow: str | None = None
    clip_grad: bool = False

    def fake_quantize(self, x: Tensor, qparams: QParams | None = None, seed: Tensor | None = None) -> Tensor:
        """x rounded: with the scales that are given, with those of x if `is_dynamic`, or without any.

        Args:
            x: `[...]`.
            qparams: scales and zero points, of the shape that `Granularity` tells.
            seed: 0-d int64, for the stochastic modes.
        """
        if qparams is None and not self.is_dynamic:
            return self.rounded(x, None, seed)
        if x.numel() == 0:
            return x.clone()
        size, dims = self.granularity.size, self.granularity.shared_dims(x.dim())

        def scaled(x: Tensor, qparams: QParams | None, seed: Tensor | None) -> Tensor:
            return self.rounded(x, self.dynamic_qparams(x, dims) if qparams is None else qparams, seed)

        return scaled(x, qparams, seed) if size is None else _by_groups(scaled, x, size, qparams, seed)

    def dynamic_qparams(self, x: Tensor, dims: tuple[int, ...]) -> QParams:
        """Scale and zero point from x, those of elements that differ along `dims` alone together."""
        wide = x.detach().to(core.compute_carrier(x.dtype).dtype)
        if self.format.has_zero_point:
            ends = (wide.amin(dims, keepdim=True), wide.amax(dims, keepdim=True)) if dims else (wide, wide)
            return self.format.qparams_for(*ends)
        magnitude = wide.abs()
        return self.format.scale_for(magnitude.amax(dims, keepdim=True) if dims else magnitude), None

    def rounded(self, x: Tensor, qparams: QParams | None, seed: Tensor | None) -> Tensor:
        """x rounded, with scale and zero point that broadcast to x or without; what sets the kinds apart."""
        raise NotImplementedError


class FloatQuantizer(Quantizer[FloatFormat]):
    """Floating point; with a scale, that is the real value of 1."""

    def rounded(self, x: Tensor, qparams: QParams | None, seed: Tensor | None) -> Tensor:
        if qparams is None:
            overflow = self.overflow or ("ieee" if self.format.has_inf else "saturate")
            return self._by_op(x, overflow, self.clip_grad, seed)
        wide = core.compute_carrier(x.dtype).dtype
        step = qparams[0].detach().to(wide)
        ratio = x.detach().to(wide) / step
        y = self._by_op(ratio, self.overflow or "saturate", False, seed)
        clipped, limit = ratio if self.clip_grad else None, self.format.max
        return torch.ops.fuse_pass.straight_through(x, (y * step).to(x.dtype), clipped, -limit, limit)  # type: ignore[no-any-return]

    def _by_op(self, x: Tensor, overflow: str, clip_grad: bool, seed: Tensor | None) -> Tensor:
        fmt = self.format
        how = (fmt.exp_bits, fmt.sig_bits, fmt.bias, fmt.encoding, self.rounding, fmt.subnormal, overflow)
        return torch.ops.fuse_pass.fake_quantize(x, seed, *how, clip_grad)  # type: ignore[no-any-return]


class IntQuantizer(Quantizer[IntFormat]):
    """Integers times a scale, which has a gradient."""

    def rounded(self, x: Tensor, qparams: QParams | None, seed: Tensor | None) -> Tensor:
        assert qparams is not None
        fmt = self.format
        return torch.ops.fuse_pass.fake_quantize_int(  # type: ignore[no-any-return]
            x, *qparams, seed, fmt.quant_min, fmt.quant_max, self.rounding, self.clip_grad
        )


class FixedQuantizer(Quantizer[FixedFormat]):
    """Fixed point: integers times the quantum."""

    def rounded(self, x: Tensor, qparams: QParams | None, seed: Tensor | None) -> Tensor:
        fmt = self.format
        step = torch.full((), fmt.quantum, dtype=core.compute_carrier(x.dtype).dtype, device=x.device)
        low, high = (_held(int(end / fmt.quantum), x.dtype) for end in (fmt.min, fmt.max))
        return torch.ops.fuse_pass.fake_quantize_int(x, step, None, seed, low, high, self.rounding, self.clip_grad)  # type: ignore[no-any-return]


def _held(number: int, dtype: torch.dtype) -> int:
    """The integer next to `number`, towards zero, that `dtype` holds."""
    surplus = max(abs(number).bit_length() - 1 - core.fraction_bits(dtype), 0)
    magnitude = abs(number) >> surplus << surplus
    return magnitude if number > 0 else -magnitude


class BlockQuantizer(Quantizer[BlockFormat]):
    """Blocks of neighbours along the last dimension, which share a power of two."""

    def rounded(self, x: Tensor, qparams: QParams | None, seed: Tensor | None) -> Tensor:
        if x.numel() == 0:
            return x.clone()
        return _by_groups(lambda blocks, _, seed: self._by_block(blocks, seed), x, self.format.block_size, None, seed)

    def _by_block(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """`x [..., blocks, elements]`."""
        fmt, carrier = self.format, core.compute_carrier(x.dtype)
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
        if self.rounding in ("plus_inf", "minus_inf", "odd"):  # what vanished in the product goes to its neighbour
            vanished = (ratio == 0) & (blocks != 0)
            ratio = torch.where(vanished, blocks.sign() * torch.finfo(carrier.dtype).tiny, ratio)
        element = quantizer_for(fmt.element, self.rounding, overflow="saturate").rounded(ratio, None, seed)
        return torch.ops.fuse_pass.straight_through(x, (element * up * up_again).to(x.dtype))  # type: ignore[no-any-return]


def _power_of_two(exponent: Tensor, carrier: core.Carrier) -> Tensor:
    return ((exponent + carrier.bias) << carrier.sig_bits).view(carrier.dtype)


def _by_groups(
    rounded: Callable[[Tensor, QParams | None, Tensor | None], Tensor],
    x: Tensor,
    size: int,
    qparams: QParams | None,
    seed: Tensor | None,
) -> Tensor:
    """`rounded` for the groups of `size` neighbours, `[..., groups, size]`, and then for the shorter one left over.

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
            of_part = None if qparams is None else _of_groups(qparams, start, start + count)
            stream = seed if start == 0 or seed is None else seed ^ _LEFT_OVER
            parts.append(rounded(part, of_part, stream).flatten(-2))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y[0] if x.dim() == 0 else y


def _of_groups(qparams: QParams, start: int, stop: int) -> QParams:
    """Those of some groups; a single scale is that of all."""
    scale, zero_point = (q[..., start:stop, :] if q is not None and q.dim() > 1 else q for q in qparams)
    assert scale is not None
    return scale, zero_point


QUANTIZERS: dict[type[Format], type[Quantizer[Any]]] = {
    FloatFormat: FloatQuantizer,
    IntFormat: IntQuantizer,
    FixedFormat: FixedQuantizer,
    BlockFormat: BlockQuantizer,
}
"""The quantizer of every kind of format."""


def quantizer_for(
    fmt: Format,
    rounding: str,
    granularity: Granularity = Granularity(),  # noqa: B008  # frozen
    *,
    is_dynamic: bool = False,
    overflow: str | None = None,
    clip_grad: bool = False,
) -> Quantizer[Any]:
    """The quantizer of a format; see `Quantizer` for the arguments. Dynamic scales clip nothing.

    Raises:
        TypeError: a kind of format that is not in `QUANTIZERS`.
    """
    for kind in type(fmt).__mro__:
        if kind in QUANTIZERS:
            return QUANTIZERS[kind](fmt, rounding, granularity, is_dynamic, overflow, clip_grad and not is_dynamic)
    raise TypeError(f"no quantizer for a {type(fmt).__name__}; expected one for it in quantizers.QUANTIZERS")
