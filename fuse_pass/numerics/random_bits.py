"""Counter-based random numbers in int32 tensor arithmetic: the same bits eager, compiled, on CPU and GPU.

A dropout mask is a pure function of (seed, element index), so backward recomputes it and nothing is stored. Inductor's
own CPU dropout runs a scalar Philox per element (8.2 ns each on one Zen 5 core); this hash vectorises (below 1 ns).

The hash is `lowbias32` of C. Wellons' hash-prospector with the low half of the seed mixed in before its first
multiplication, the high half after it, and a third multiplication in place of its last xor-shift, so that either half
reaches the high bits. Inductor generates code for each step in every kernel that drops something, so there are no more
of them than the statistics need.

The low half alone would only exchange elements: the numbers of seed ^ d would be those of seed, with element i moved to
i ^ d, and as many of them would be kept or rounded up. So it is mixed into the high half first, once for all elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuse_pass.inductor import compat


def _int32(value: int) -> int:
    """The int32 with the same low 32 bits."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


# The first two are the least biased pair that is known for these shifts (issue 19 of hash-prospector). With lowbias32's
# own, masks whose seeds differ in bit 29 alone were correlated by 1 %.
_MULTIPLIERS = _int32(0x21F0AAAD), _int32(0xD35A2D97), _int32(0x31848BAB)


def _mixed(low: Tensor) -> Tensor:
    """Another int32 for every one, and a change of any bit reaches all."""
    first, second, _ = _MULTIPLIERS
    bits = (low ^ ((low >> 16) & 0xFFFF)) * first
    return (bits ^ ((bits >> 15) & 0x1FFFF)) * second


# ATen's AVX2 vectors of int32 are loaded by way of a buffer: written in two halves and read as a whole, for which the
# processor must wait. Its float32 vectors are loaded as they are (dropout of 64x768 on a Xeon held to AVX2, with code
# for Zen 3: 155 against 46 us). With AVX-512 it is the change of type that goes through a buffer, so int32 is loaded.
_LOADED_AS_FLOATS = torch.backends.cpu.get_cpu_capability() == "AVX2"


def _stored_once(x: Tensor) -> Tensor:
    """`compat.stored_once` of int32, in the type whose vectors this processor loads faster; the bits stay."""
    if not _LOADED_AS_FLOATS:
        return compat.stored_once(x)
    return compat.stored_once(x.view(torch.float32)).view(torch.int32)


def random_bits(seed: Tensor, rows: int, columns: int) -> Tensor:
    """Uniform int32 `[rows, columns]` from a 0-d int64 seed; the high bits are the best.

    The element index wraps at 2**32, far beyond the size of a tensor that has to be independent of itself.
    """
    low = seed.to(torch.int32)
    high = (seed >> 32).to(torch.int32) ^ _mixed(low)
    first, second, third = _MULTIPLIERS
    bits = (_positions(rows, columns, seed.device) ^ low) * first ^ high
    bits = bits ^ ((bits >> 16) & 0xFFFF)  # `>>` is arithmetic, the mask makes it logical
    bits = bits * second
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    return bits * third


def _positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """`row * columns + column` modulo 2**32, as int32 `[rows, columns]`."""
    if device.type != "cpu":
        # One number, which Inductor has as the index of the element; two keep it from joining loops over other shapes
        # of the same elements, so that the dropout would be a kernel of its own.
        return torch.arange(rows * columns, device=device).to(torch.int32).view(rows, columns)
    row = torch.arange(rows, dtype=torch.int32, device=device).view(rows, 1)
    # Loaded, where Inductor would put 16 numbers together for each vector, and no longer one with the row, so that
    # Inductor keeps a loop per row, which a norm can share (forward and backward of 8192x768: 10.8 against 8.4 ms).
    column = _stored_once(torch.arange(columns, dtype=torch.int32, device=device))
    return row * columns + column


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Bool `[rows, columns]`, True with probability 1 - p (exact to 2**-32)."""
    threshold = min(round(p * 2**32) - 2**31, 2**31 - 1)
    return random_bits(seed, rows, columns) >= threshold


def keep_only(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """`x / (1 - p)` where `keep` (of any shape with as many elements) is True, 0 elsewhere; has the strides of
    `F.dropout(x, p)`, which are those of x where x has no gaps.
    """
    kept = (x * (1 / (1 - p))).masked_fill(~keep.view(x.shape), 0.0)  # contiguous, whatever x is
    like = torch.empty_like(x)
    return kept if kept.stride() == like.stride() else torch.ops.aten.copy(like, kept)


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """`x / (1 - p)` where `keep_mask` is True, exactly 0 elsewhere; `x [rows, columns]` itself without a seed.

    It is its own gradient: `dropout(grad, seed, p)` is the derivative along `grad`.
    """
    if seed is None or p == 0:
        return x
    if p == 1:
        return torch.zeros_like(x)
    rows, columns = x.shape
    return torch.where(keep_mask(seed, rows, columns, p), x * (1 / (1 - p)), 0.0)
