"""Products of matrices with weights of 8, 4, 2 or 1 bits, and the order in which such weights are packed.

Weights are codes `[columns, inner]`, packed into `words` int32 `[tiles, words per column, 16]`: see `few_bits.cpp`. The
order is the same on every machine. A code of `bits` bits takes exactly that much memory, but for the padding of columns
to a multiple of 16 and of the inner size to one of `32 / bits`.

What a code means is the caller's affair: `integer_product` takes codes as the unsigned numbers that they are, and
`float_product` looks them up in a table.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.gemm import integers, probe
from fuse_pass.inductor import compat
from fuse_pass.inductor.reach import Reach, reach
from fuse_pass.kernels import build

TILE = 16
WIDTHS = (8, 4, 2, 1)
# The largest inner size at which no sum of products of int8 values and codes of 8 bits leaves int32.
MAX_INNER = (2**31 - 1) // (128 * 255)


def padded_inner(inner: int, bits: int) -> int:
    """The inner size that packed weights have."""
    return -(-inner // (32 // bits)) * (32 // bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`[columns, inner] → words [ceil(columns / 16), ceil(inner · bits / 32), 16]`, int32.

    Args:
        codes: integers in 0 … 2^bits - 1.
        bits: one of `WIDTHS`.
    """
    columns, inner = codes.shape
    per_word = 32 // bits
    codes = F.pad(codes.to(torch.uint8), (0, -inner % per_word, 0, -columns % TILE))
    parts = codes.view(codes.shape[0] // TILE, TILE, codes.shape[1] // per_word, 8 // bits, 4)
    octets = parts[..., 0, :]
    for j in range(1, 8 // bits):
        octets = octets | (parts[..., j, :] << (bits * j))
    words: Tensor = octets.contiguous().view(torch.int32).squeeze(-1)
    return words.transpose(1, 2).contiguous()


def unpack(words: Tensor, columns: int, inner: int, bits: int) -> Tensor:
    """The codes `[columns, inner]`, uint8, that `pack` packed."""
    octets = _octets(words.transpose(1, 2))
    mask = (1 << bits) - 1
    parts = torch.stack([(octets >> (bits * j)) & mask for j in range(8 // bits)], dim=-2)
    return parts.flatten(2).flatten(0, 1)[:columns, :inner]


def _octets(words: Tensor) -> Tensor:
    """`[…, words] → […, words, 4]`, uint8."""
    if reach() is Reach.HERE:
        return words.contiguous().unsqueeze(-1).view(torch.uint8)
    # By arithmetic, the same on every machine; and Inductor of torch 2.11 packages no view of another width.
    return torch.stack([(words >> (8 * i)) & 0xFF for i in range(4)], dim=-1).to(torch.uint8)


def columns_of_inner(words: Tensor, which: Tensor, columns: int) -> Tensor:
    """The codes of some inner positions, `[len(which), columns]`, of weights of 8 bits; the others are not unpacked."""
    octets = words.unsqueeze(-1).view(torch.uint8)  # [tiles, words, 16, 4]
    return octets[:, which // 4, :, which % 4].flatten(1)[:, :columns]


def pack_columns(values: Tensor) -> Tensor:
    """One value for every column and group, in the order of tiles: `[columns, groups] → [tiles, groups, 16]`."""
    padded = F.pad(values, (0, 0, 0, -values.shape[0] % TILE))
    return padded.view(padded.shape[0] // TILE, TILE, values.shape[1]).transpose(1, 2).contiguous()


def unpack_columns(values: Tensor, columns: int) -> Tensor:
    """`[tiles, groups, 16] → [columns, groups]`."""
    tiles, groups, _ = values.shape
    return values.transpose(1, 2).reshape(tiles * TILE, groups)[:columns]


def integer_product(a: Tensor, words: Tensor, columns: int, bits: int) -> Tensor:
    """`a [rows, inner] @ codes [columns, inner].T → [rows, columns]`, int32, exact.

    Args:
        a: int8.
        words: the codes as `pack` packs them, taken as unsigned numbers.
        columns: how many columns there are.
        bits: of a code.

    Raises:
        ValueError: an inner size other than that of the words, or above `MAX_INNER`.
    """
    rows, inner = a.shape
    needed = words.shape[1] * (32 // bits)
    if padded_inner(inner, bits) != needed or inner > MAX_INNER:
        raise ValueError(
            f"integer_product: expected {needed - 32 // bits + 1} to {needed} summed columns for these weights, at "
            f"most {MAX_INNER} (int32 would overflow), got {inner}"
        )
    library = build.library() if a.device.type == "cpu" else None
    if library is None:
        return _integer_product(a, unpack(words, columns, inner, bits))
    if bits == 8 and rows >= _MANY_ROWS and inner > 1 and _int_mm_is_faster():
        return _by_int_mm(a, words, columns)
    return _by_library(library, a, words, columns, bits)


def _by_library(library: ctypes.CDLL, a: Tensor, words: Tensor, columns: int, bits: int) -> Tensor:
    rows, inner = a.shape
    needed = words.shape[1] * (32 // bits)
    a = F.pad(a, (0, needed - inner)) if needed > inner else a.contiguous()
    y = a.new_empty(rows, columns, dtype=torch.int32)
    threads = _threads(rows * columns * inner)
    library.integer_product(
        a.data_ptr(), rows, needed, words.data_ptr(), words.shape[1], y.data_ptr(), columns, bits, threads
    )
    return y


# Rows from which unpacking the weight costs less than a faster product saves, where there is one.
_MANY_ROWS = 256


@functools.cache
def _int_mm_is_faster() -> bool:
    """Whether PyTorch's own int8 product, on weights that are unpacked first, beats the kernel with many rows.

    It may where it has instructions that our kernels do not use here: by VNNI alone 512 x 768 x 3072 takes 4.7 ms, by
    PyTorch with AMX 2.0 without unpacking. Ours with AMX takes 2.0 as well (Intel Xeon).
    """
    library = build.library()
    if library is None or not integers.cpu_int_mm_is_exact():
        return False
    a, words = (
        torch.ones(_MANY_ROWS, 768, dtype=torch.int8),
        torch.zeros(768 // TILE, 768 // 4, TILE, dtype=torch.int32),
    )
    by_int_mm = functools.partial(_by_int_mm, a, words, 768)
    return probe.is_faster(by_int_mm, functools.partial(_by_library, library, a, words, 768, 8))


def _by_int_mm(a: Tensor, words: Tensor, columns: int) -> Tensor:
    """Codes of 8 bits less 128 are int8; what that takes away is added again."""
    int_mm = compat.int_mm()
    assert int_mm is not None  # its exactness was asked for
    octets = unpack(words, columns, a.shape[1], 8) ^ 0x80
    of_rows = a.sum(1, dtype=torch.int32).unsqueeze(1)
    return int_mm(a.contiguous(), octets.view(torch.int8).t()) + 128 * of_rows


def _integer_product(a: Tensor, codes: Tensor) -> Tensor:
    """The same in float64, whose sums are exact far beyond int32."""
    return (a.double() @ codes.double().t()).to(torch.int32)


def float_product(
    x: Tensor, words: Tensor, table: Tensor, scale: Tensor, shift: Tensor | None, columns: int, bits: int
) -> Tensor:
    """`x [rows, inner] @ weight [columns, inner].T → [rows, columns]`, all float32.

    The weight is `scale · table[code] - shift`, rounded once to float32 where there are several rows.

    Args:
        x: float32.
        words: the codes as `pack` packs them.
        table: `[16]`, float32, the value of each code; codes of 8 bits are int8 and have none.
        scale: float32 `[tiles, groups, 16]` as `pack_columns` orders them; a group is so many consecutive columns of x.
        shift: likewise, or None.
        columns: how many columns there are.
        bits: 4 or 8.

    Raises:
        ValueError: an inner size other than that of the words.
    """
    rows, inner = x.shape
    needed = words.shape[1] * (32 // bits)
    if padded_inner(inner, bits) != needed:
        raise ValueError(f"float_product: expected {needed} columns of x for these weights, got {inner}")
    if needed == 0:  # there are no groups either
        return x.new_zeros(rows, columns)
    library = build.library() if x.device.type == "cpu" else None
    if library is None:
        return x @ float_weight(words, table, scale, shift, columns, inner, bits).t()
    x = F.pad(x, (0, needed - inner)) if needed > inner else x.contiguous()
    y = x.new_empty(rows, columns)
    of_shift = None if shift is None else shift.data_ptr()
    grid = (table.data_ptr(), scale.data_ptr(), of_shift, words.shape[1] // scale.shape[1])
    threads = _threads(rows * columns * inner)
    library.float_product(
        x.data_ptr(), rows, needed, words.data_ptr(), words.shape[1], *grid, y.data_ptr(), columns, bits, threads
    )
    return y


def float_weight(
    words: Tensor, table: Tensor, scale: Tensor, shift: Tensor | None, columns: int, inner: int, bits: int
) -> Tensor:
    """The weight `[columns, inner]` that the arguments of `float_product` stand for, float32."""
    groups, padded = scale.shape[1], words.shape[1] * (32 // bits)
    if padded == 0:  # there are no groups either
        return scale.new_zeros(columns, 0)
    codes = unpack(words, columns, padded, bits)
    values = codes.view(torch.int8).float() if bits == 8 else table[codes.int()]
    grouped = values.view(columns, groups, padded // groups)
    weight = grouped * unpack_columns(scale, columns).unsqueeze(-1)
    if shift is not None:
        weight = weight - unpack_columns(shift, columns).unsqueeze(-1)
    return weight.view(columns, padded)[:, :inner]


# Products of fewer operations are computed by one thread: waking another takes some microseconds.
_MIN_PARALLEL = 1 << 18


def _threads(operations: int) -> int:
    return torch.get_num_threads() if operations >= _MIN_PARALLEL else 1
