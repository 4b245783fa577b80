"""How a weight becomes packed codes: the specs of `fuse_pass.pack`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.kernels import few_bits
from fuse_pass.numerics import bit_codes
from fuse_pass.ops.llm_int8 import checked_threshold, quantize_rows
from fuse_pass.ops.packed_dense import INT8, LLM_INT8, WEIGHT_ONLY, integer_codes

# Values of the 16 codes. int4: two's complement. nf4: 2305.14314, appendix E. fp4: e2m1, sign in the highest bit.
TABLES: dict[str, tuple[float, ...]] = {
    "int4": (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1),
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6),
}  # fmt: skip
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class PackSpec:
    """What a weight is packed to, and how it is multiplied.

    Attributes:
        name: one of `SPECS`: `"int8"` (int8 weights per output feature, inputs rounded to int8 per token),
            `"int8_weight_only"`, `"int4_weight_only"`, `"nf4"` (2305.14314) and `"fp4"` (e2m1), whose inputs stay as
            they are, `"llm_int8"` (2208.07339), `"b1"` (2310.11453) and `"b1.58"` (2402.17764).
        group: of the 4-bit ones, how many consecutive inputs share a scale: 32, 64 or 128.
        symmetric: of `"int4_weight_only"`, whether 0 is in the middle of a group; else each has its own minimum.
        threshold: of `"llm_int8"`, see `fuse_pass.nn.Int8Linear`.

    Raises:
        ValueError: an unknown name, group or threshold.
    """

    name: str
    group: int = 64
    symmetric: bool = True
    threshold: float = 6.0

    def __post_init__(self) -> None:
        if self.name not in SPECS:
            raise ValueError(f"pack: expected one of {', '.join(map(repr, SPECS))}, got {self.name!r}")
        if self.group not in GROUPS:
            raise ValueError(f"pack: group: expected one of {', '.join(map(str, GROUPS))}, got {self.group!r}")
        checked_threshold(self.threshold)

    @property
    def bits(self) -> int:
        """Of a weight, without scales."""
        return {"b1": 1, "b1.58": 2}.get(self.name, 8 if "int8" in self.name else 4)

    @property
    def kind(self) -> str:
        """One of `ops.packed_dense.KINDS`."""
        return self.name if self.name in (INT8, LLM_INT8, *bit_codes.VARIANTS) else WEIGHT_ONLY

    @property
    def table(self) -> str:
        """The name of its values in `TABLES`; empty for codes that are integers."""
        return {"int4_weight_only": "int4", "nf4": "nf4", "fp4": "fp4"}.get(self.name, "")

    def to_bytes(self) -> bytes:
        """For a state dict."""
        return json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> PackSpec:
        """The other way.

        Raises:
            ValueError: nothing that `to_bytes` of this version writes.
        """
        try:
            fields = dict(json.loads(content))
            version = fields.pop("version")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"packed_format: expected what fuse_pass.pack writes, got {content[:80]!r}") from error
        if version != _VERSION:
            raise ValueError(f"packed_format: expected version {_VERSION}, got {version!r}; pack the model again")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"packed_format: expected what fuse_pass.pack writes, got {content[:80]!r}") from error


# Another number where packed weights of before would be read wrongly.
_VERSION = 1


@dataclass(frozen=True)
class Packed:
    """A packed weight `[d_out, d_in]`, as `ops.packed_dense` takes it."""

    words: Tensor
    scale: Tensor
    shift: Tensor | None = None


def _int8(weight: Tensor, spec: PackSpec) -> Packed:
    steps, scale = quantize_rows(weight)
    return of_integers(steps, scale.float(), spec.name)


@dataclass(frozen=True)
class Codes:
    """Of a weight-only spec: codes uint8 `[d_out, d_in up to whole groups]`, scale and shift `[d_out, groups]`."""

    codes: Tensor
    scale: Tensor
    shift: Tensor | None = None


def _int8_weight_only(weight: Tensor, spec: PackSpec) -> Codes:
    steps, scale = quantize_rows(weight)
    return Codes(steps.contiguous().view(torch.uint8), scale.float().unsqueeze(1))


def _int4(weight: Tensor, spec: PackSpec) -> Codes:
    groups = _grouped(weight, spec.group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(low / -8, high / 7)
        steps = torch.round(groups / _divisor(scale)).clamp(-8, 7)
        shift = None
    else:
        scale = (high - low) / 15
        zero = torch.round(-low / _divisor(scale).squeeze(-1)).clamp(0, 15)
        steps = (torch.round(groups / _divisor(scale)) + zero.unsqueeze(-1)).clamp(0, 15) - 8
        shift = (zero - 8) * scale
    return Codes((steps.to(torch.int8) & 15).view(torch.uint8).flatten(1), scale, shift)


def _by_table(weight: Tensor, spec: PackSpec) -> Codes:
    groups = _grouped(weight, spec.group)
    values = torch.tensor(TABLES[spec.table], device=weight.device)
    scale = groups.abs().amax(-1) / values.abs().max()
    ordered, order = values.sort(stable=True)
    # The nearest value; of two equally near ones the lower.
    middles = (ordered[:-1] + ordered[1:]) / 2
    codes = order[torch.bucketize(groups / _divisor(scale), middles)]
    return Codes(codes.flatten(1).to(torch.uint8), scale)


def _bits(weight: Tensor, spec: PackSpec) -> Packed:
    threshold, scale = bit_codes.weight_statistics(weight, 1, spec.name)
    codes = bit_codes.weight_codes(weight, threshold, spec.name)
    return of_integers(codes, bit_codes.per_row(scale, weight.shape[0]).contiguous(), spec.name)


def of_integers(integers: Tensor, scale: Tensor, name: str) -> Packed:
    """Integers `[d_out, d_in]` of an integer kind that were found before, with their scale `[d_out]`."""
    return Packed(few_bits.pack(integer_codes(integers, name), PackSpec(name).bits), scale)


def _grouped(weight: Tensor, group: int) -> Tensor:
    """`[d_out, d_in] → [d_out, groups, group]`, float32; the last group is filled up with zeros."""
    padded = F.pad(weight.float(), (0, -weight.shape[1] % group))
    return padded.view(weight.shape[0], padded.shape[1] // group, group)


def _divisor(scale: Tensor) -> Tensor:
    """A group of zeros has scale 0, and zeros for its codes."""
    return torch.where(scale == 0, 1.0, scale).unsqueeze(-1)


_INTEGERS: dict[str, Callable[[Tensor, PackSpec], Packed]] = {
    INT8: _int8,
    LLM_INT8: _int8,
    "b1": _bits,
    "b1.58": _bits,
}
_WEIGHT_ONLY: dict[str, Callable[[Tensor, PackSpec], Codes]] = {
    "int8_weight_only": _int8_weight_only,
    "int4_weight_only": _int4,
    "nf4": _by_table,
    "fp4": _by_table,
}
SPECS = (*_INTEGERS, *_WEIGHT_ONLY)


@torch.no_grad()
def weight_only_codes(weight: Tensor, spec: PackSpec) -> Codes:
    """A floating-point weight `[d_out, d_in]` as the codes of a weight-only spec.

    Raises:
        ValueError: a weight with NaN or an infinity, which no code stands for.
    """
    require_finite(weight)
    return _WEIGHT_ONLY[spec.name](weight, spec)


def require_finite(weight: Tensor) -> None:
    """ValueError if no code stands for some element."""
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError("pack: expected a finite weight, got one with NaN or infinity")


@torch.no_grad()
def packed(weight: Tensor, spec: PackSpec) -> Packed:
    """A floating-point weight `[d_out, d_in]` as packed codes.

    Raises:
        ValueError: a weight with NaN or an infinity, which no code stands for, or an inner size whose sums leave int32.
    """
    if spec.kind == WEIGHT_ONLY:
        found = weight_only_codes(weight, spec)
        scale, shift = (None if part is None else few_bits.pack_columns(part) for part in (found.scale, found.shift))
        assert scale is not None
        return Packed(few_bits.pack(found.codes, spec.bits), scale, shift)
    require_finite(weight)
    if weight.shape[1] > few_bits.MAX_INNER:
        raise ValueError(
            f"pack: {spec.name!r} sums at most {few_bits.MAX_INNER} inputs exactly in int32, got {weight.shape[1]}; "
            "use a weight-only spec"
        )
    return _INTEGERS[spec.name](weight, spec)
