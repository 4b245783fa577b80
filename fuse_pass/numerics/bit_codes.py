"""Binary and ternary weights, 8-bit activations: how BitLinear makes integers of real numbers, and bytes of integers.

    b1     W̃ = sign(W − α),              α = mean(W), β = mean|W|, sign(0) = −1             BitNet, 2310.11453
    b1.58  W̃ = clip(round(W / β), −1, 1),             β = mean|W|                            2402.17764
    both   x̃ = round(x Q / γ),            γ = max|x|, Q = 127

Shapes: W and W̃ `[out, in]`; α and β `[groups]`, one for each `out / groups` consecutive rows; x and x̃ `[rows, in]`;
γ `[1, 1]` (b1: of the whole tensor) or `[rows, 1]` (b1.58: of each token). Ŵ = β W̃ and x̂ = x̃ γ / Q are the real
numbers that the integers stand for. β is rounded to the dtype of W, so that Ŵ is exact in that dtype.

The integers are the same on every device, eager or compiled: a weight is compared with its threshold (α, or β / 2,
beyond which W / β rounds away from zero) instead of being divided, means are summed in float64, where the order of
the terms does not show, and the one division rounds correctly everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.numerics.formats import IntFormat
from fuse_pass.numerics.tensors import accumulation_dtype, quotient

LEVELS = IntFormat(8).quant_max
_SMALLEST_NEGATIVE = -(2**31) + 1  # float32 −2^-149, as the integer of its bits


@dataclass(frozen=True)
class Variant:
    """One way to binarise a Linear: bits that a packed weight takes, and whether γ is per token or per tensor."""

    bits: int
    per_token: bool

    @property
    def per_byte(self) -> int:
        return 8 // self.bits


VARIANTS = {"b1": Variant(bits=1, per_token=False), "b1.58": Variant(bits=2, per_token=True)}


def weight_statistics(weight: Tensor, groups: int, variant: str) -> tuple[Tensor, Tensor]:
    """Threshold (in the accumulation dtype) and scale β (in the dtype of the weight), both `[groups]`."""
    grouped = weight.reshape(groups, weight.numel() // groups)
    size = _mean(grouped.abs())
    threshold = _mean(grouped) if variant == "b1" else size / 2
    return _round_down(threshold, accumulation_dtype(weight.dtype)), size.to(weight.dtype)


def _mean(values: Tensor) -> Tensor:
    """`[groups, n] → [groups]`, float64; exact where all values are equal."""
    count = max(values.shape[1], 1)
    if values.dtype is torch.float64 and values.shape[1] > 0:
        first = values[:, :1]
        return first.squeeze(1) + (values - first).sum(1) / count
    return values.sum(1, dtype=torch.float64) / count  # of float32 values every partial sum is exact or nearly so


def _round_down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of `dtype` ≤ value: a number of `dtype` is above the one just if it is above the other."""
    rounded = value.to(dtype)
    if dtype is torch.float64:
        return rounded
    # `nextafter` by bits: Inductor repeats this for every vector of weights, and the library call is slow.
    bits = rounded.view(torch.int32)
    below = torch.where(rounded > 0, bits - 1, torch.where(rounded < 0, bits + 1, _SMALLEST_NEGATIVE))
    return torch.where(rounded.double() > value, below.view(torch.float32), rounded)


def weight_codes(weight: Tensor, threshold: Tensor, variant: str) -> Tensor:
    """W̃, int8: −1 and 1 (b1), or −1, 0 and 1 (b1.58)."""
    wide = weight.to(threshold.dtype)
    limit = per_row(threshold, weight.shape[0]).unsqueeze(1)
    # By sign bits and not by bools, of which Inductor makes an int8 one at a time (6 ns each, against 0.07).
    above = _minus_one_if_negative(limit - wide)
    return (-2 * above - 1 if variant == "b1" else _minus_one_if_negative(wide + limit) - above).to(torch.int8)


def _minus_one_if_negative(x: Tensor) -> Tensor:
    return x.view(torch.int64) >> 63 if x.dtype is torch.float64 else x.view(torch.int32) >> 31


def per_row(of_groups: Tensor, rows: int) -> Tensor:
    """`[groups] → [rows]`, each value repeated for the rows of its group."""
    groups = of_groups.shape[0]
    return of_groups.unsqueeze(1).expand(groups, rows // groups).reshape(rows)


def activation_codes(x: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """x̃ `[rows, in]`, integers in the accumulation dtype, and γ / Q; zeros for zeros and for empty tensors."""
    wide = x.to(accumulation_dtype(x.dtype))
    largest = wide.abs().amax(1, keepdim=True) if x.shape[1] > 0 else wide.new_zeros(x.shape[0], 1)
    if not VARIANTS[variant].per_token:
        largest = torch.cat((largest, largest.new_zeros(1, 1))).amax(0, keepdim=True)  # an empty batch has no maximum
    divisor = torch.where(largest == 0, 1.0, largest)
    power = torch.where(divisor > 1, 1 / 128, 1.0)  # changes no bit of the quotient; without it x Q could overflow
    # |x| ≤ γ and correct rounding keep the quotient within ±Q, so there is nothing to clip.
    return torch.round(quotient(wide * (LEVELS * power), divisor * power)), largest / LEVELS


def dequantized_weight(weight: Tensor, groups: int, variant: str) -> Tensor:
    """Ŵ, in the dtype of the weight."""
    threshold, scale = weight_statistics(weight, groups, variant)
    return weight_codes(weight, threshold, variant).to(scale.dtype) * per_row(scale, weight.shape[0]).unsqueeze(1)


def dequantized_activations(x: Tensor, variant: str) -> Tensor:
    """x̂, in the accumulation dtype."""
    codes, step = activation_codes(x, variant)
    return codes * step


def packed_width(in_features: int, variant: str) -> int:
    """Bytes per row of a packed weight; each row begins in a byte of its own."""
    return -(-in_features // VARIANTS[variant].per_byte)


def pack_codes(codes: Tensor, variant: str) -> Tensor:
    """int8 `[out, in]` → uint8 `[out, packed_width]`; the first weight of a row is in the lowest bits of its byte."""
    row = VARIANTS[variant]
    fields = (codes > 0 if variant == "b1" else codes + 1).to(torch.uint8)
    padded = F.pad(fields, (0, -codes.shape[1] % row.per_byte))
    fields = padded.view(codes.shape[0], packed_width(codes.shape[1], variant), row.per_byte)
    packed: Tensor = (fields << _shifts(codes, row)).sum(-1)
    return packed.to(torch.uint8)


def unpack_codes(packed: Tensor, in_features: int, variant: str) -> Tensor:
    """uint8 `[out, packed_width]` → int8 `[out, in_features]`, the inverse of `pack_codes`."""
    row = VARIANTS[variant]
    fields: Tensor = (packed.unsqueeze(-1) >> _shifts(packed, row)) & (2**row.bits - 1)
    codes = fields.flatten(1)[:, :in_features].to(torch.int8)
    return codes * 2 - 1 if variant == "b1" else codes - 1


def _shifts(like: Tensor, row: Variant) -> Tensor:
    return torch.arange(0, 8, row.bits, dtype=torch.uint8, device=like.device)


def representative_weight(codes: Tensor, scale: Tensor, variant: str) -> Tensor:
    """A weight in the dtype of `scale` that is quantised to just these codes and this scale.

    b1: ±β. b1.58: ±β n / k and 0 for a group with k of n codes other than 0, because there β is the mean with the zeros
    counted. What rounding takes from that mean is given back, so that it is β again: some of the k are one unit in the
    last place larger, and the zeros share what is less than such a unit.
    """
    groups, dtype = scale.shape[0], scale.dtype
    signs = codes.reshape(groups, codes.numel() // groups).to(dtype)
    if variant == "b1":
        return (signs * scale.unsqueeze(1)).reshape(codes.shape)
    nonzero = signs != 0
    count = nonzero.sum(1, keepdim=True)
    total = scale.double().unsqueeze(1) * signs.shape[1]
    low = _round_towards_zero(total / count.clamp(min=1), dtype)
    high = torch.nextafter(low, torch.full_like(low, torch.inf))
    unit, missing = high.double() - low.double(), total - low.double() * count
    larger = torch.floor(missing / unit)
    rest = (missing - larger * unit) / (signs.shape[1] - count).clamp(min=1)
    magnitude = torch.where(nonzero.cumsum(1) <= larger, high, low)
    return torch.where(nonzero, signs * magnitude, rest.to(dtype)).reshape(codes.shape)


def _round_towards_zero(value: Tensor, dtype: torch.dtype) -> Tensor:
    """For values ≥ 0."""
    rounded = value.to(dtype)
    return torch.where(rounded.double() > value, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)
