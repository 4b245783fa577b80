"""A Linear with weights of 1 or 1.58 bits and 8-bit activations: BitNet (2310.11453) and BitNet b1.58 (2402.17764)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.numerics import bit_codes
from fuse_pass.ops.bit_linear import bit_linear, bit_linear_formula, bit_linear_packed, straight_through_weight
from fuse_pass.ops.plain import are_plain


class BitLinear(nn.Module):
    """`y = (W̃ x̃) β γ / 127 + bias`: integers multiplied exactly, then scaled.

    Maps `[..., in_features]` to `[..., out_features]`, any rank from 1, empty batches included.

    `"b1"`: W̃ = sign(W − mean(W)) with sign(0) = −1, and γ = max|x| over the whole input. `"b1.58"`:
    W̃ = clip(round(W / β), −1, 1), and γ for each token, so that no row of a batch depends on another. In both
    β = mean|W| and x̃ = round(127 x / γ). The weight is a full-precision Parameter, trained straight-through: the
    gradients are those of `F.linear(x̂, Ŵ, bias)` for the real numbers x̂, Ŵ that the integers stand for. No part of it
    is narrowed by autocast; `.half()` narrows the weight itself, from which training does not recover.

    The state dict is that of `nn.Linear`: `weight [out, in]` and `bias [out]`. After `pack()` it holds, instead of the
    weight, `weight_packed` (uint8 `[out, ceil(in / 8)]`, or `ceil(in / 4)` for b1.58) and `weight_scale` (β,
    `[groups]`). Either kind loads into any BitLinear of the same arguments, which becomes packed or unpacked by it.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        groups: how many sets of `out_features / groups` consecutive output rows have means of their own.
        bias: whether a bias is added.
        variant: `"b1"` or `"b1.58"`.
        device: where the parameters are created.
        dtype: their dtype.

    Raises:
        ValueError: `groups` does not divide `out_features`, or the variant is unknown.
        TypeError: `dtype` is not floating-point.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    weight_packed: Tensor | None
    weight_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int = 1,
        *,
        bias: bool = False,
        variant: str = "b1",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if variant not in bit_codes.VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(map(repr, bit_codes.VARIANTS))}, got {variant!r}")
        if not isinstance(groups, int) or groups < 1 or out_features % groups:
            raise ValueError(f"groups: expected a positive divisor of out_features={out_features}, got {groups!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
        self.in_features = in_features
        self.out_features = out_features
        self.groups = groups
        self.variant = variant
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("weight_packed", None)
        self.register_buffer("weight_scale", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias as `nn.Linear` does."""
        weight = self._unpacked_weight("reset_parameters")
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_float(cls, linear: nn.Linear, groups: int = 1, *, variant: str = "b1") -> Self:
        """A BitLinear on the Parameters of a Linear, which the two then share; train from here, or `pack()`."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"BitLinear.from_float: expected an nn.Linear, got {type(linear).__name__}")
        layer = cls(
            linear.in_features, linear.out_features, groups, variant=variant, device="meta", dtype=linear.weight.dtype
        )
        layer.weight, layer.bias = linear.weight, linear.bias  # type: ignore[assignment]  # Parameters, by their class
        return layer.train(linear.training)

    @property
    def is_packed(self) -> bool:
        return self.weight_packed is not None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features] → [..., out_features]`; raises what `nn.Linear` raises for a wrong size or dtype."""
        if self.weight_packed is None or self.weight_scale is None:
            weight = self.weight
            assert weight is not None
            self._check_input(x, weight)
            if are_plain(x, weight, self.bias):
                return bit_linear(x, weight, self.bias, self.groups, self.variant, None)[0]  # type: ignore[no-any-return]
            real_weight = straight_through_weight(weight, self.groups, self.variant)
        else:
            self._check_input(x, self.weight_scale)
            if are_plain(x, self.weight_scale, self.bias):
                arguments = (x, self.weight_packed, self.weight_scale, self.bias, self.variant, None)
                return bit_linear_packed(*arguments)  # type: ignore[no-any-return]
            codes = bit_codes.unpack_codes(self.weight_packed, self.in_features, self.variant)
            real_weight = codes * bit_codes.per_row(self.weight_scale, self.out_features).unsqueeze(1)
        return bit_linear_formula(x, real_weight, self.bias, self.variant)

    def _check_input(self, x: Tensor, like: Tensor) -> None:
        """Lets `F.linear` complain about what a Linear of the dtype and device of `like` does not take."""
        if torch.is_autocast_enabled(x.device.type):
            dtype_fits = x.is_floating_point() and (x.dtype is torch.float64) is (like.dtype is torch.float64)
        else:
            dtype_fits = x.dtype is like.dtype and (self.bias is None or self.bias.dtype is like.dtype)
        if dtype_fits and x.device == like.device and x.dim() > 0 and x.shape[-1] == self.in_features:
            return
        F.linear(x, like.new_zeros(1, 1).expand(self.out_features, self.in_features), self.bias)
        raise RuntimeError(
            f"BitLinear: expected [..., {self.in_features}] in {like.dtype} on {like.device}, "
            f"got {list(x.shape)} in {x.dtype} on {x.device}"
        )

    @torch.no_grad()
    def pack(self) -> Self:
        """Replaces the weight by its integers, 1 (b1) or 2 (b1.58) bits each, and β; the layer computes the same.

        In place; returns the layer. The integer part of the result is the same bit for bit. Inputs and the bias still
        get gradients, the weight is no Parameter any more.
        """
        if not self.is_packed:
            weight = self._unpacked_weight("pack")
            threshold, scale = bit_codes.weight_statistics(weight, self.groups, self.variant)
            codes = bit_codes.weight_codes(weight, threshold, self.variant)
            self._set_packed(bit_codes.pack_codes(codes, self.variant), scale)
        return self

    @torch.no_grad()
    def unpack(self) -> Self:
        """Gives a packed layer a weight again, one that is quantised to the same integers and the same β.

        In place; returns the layer. Nothing that eval uses is lost by `pack()` and `unpack()`, and a second `pack()`
        gives the same bytes. Lost is what training had in the weight: how far each value was from the threshold (all
        are now ±β; for b1.58 ± one magnitude or 0 up to rounding, with β as mean size), the Parameter object that an
        optimizer knew, and whether it was frozen.
        """
        if self.weight_packed is not None and self.weight_scale is not None:
            codes = bit_codes.unpack_codes(self.weight_packed, self.in_features, self.variant)
            self._set_weight(bit_codes.representative_weight(codes, self.weight_scale, self.variant))
        return self

    def _unpacked_weight(self, purpose: str) -> nn.Parameter:
        weight = self._parameters.get("weight")
        if weight is None:
            reason = "packed; unpack() it first" if self.is_packed else "parametrised or pruned; remove that first"
            raise RuntimeError(f"BitLinear.{purpose}: expected a weight of its own, but this one is {reason}")
        return weight

    def _set_packed(self, packed: Tensor, scale: Tensor) -> None:
        self.weight, self.weight_packed, self.weight_scale = None, packed, scale

    def _set_weight(self, weight: Tensor) -> None:
        self.weight, self.weight_packed, self.weight_scale = nn.Parameter(weight), None, None

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Becomes packed or unpacked first, as the state dict is."""
        like = self.weight if self.weight_scale is None else self.weight_scale
        assert like is not None
        packed, weight = (state_dict.get(prefix + name) for name in ("weight_packed", "weight"))
        if packed is not None and self._parameters.get("weight") is not None:
            width = bit_codes.packed_width(self.in_features, self.variant)
            if self._fits("weight_packed", packed, (self.out_features, width), prefix, lists[-1]):
                scale = like.new_empty(self.groups)
                self._set_packed(like.new_empty(self.out_features, width, dtype=torch.uint8), scale)
        elif weight is not None and self.is_packed:
            shape = (self.out_features, self.in_features)
            if self._fits("weight", weight, shape, prefix, lists[-1]):
                self._set_weight(like.new_empty(shape))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def _fits(self, name: str, value: Tensor, shape: tuple[int, ...], prefix: str, errors: list[str]) -> bool:
        """Whether the layer may change for this value; a failed load leaves it as it was, as `nn.Linear`'s does."""
        fits = value.shape == shape
        if not fits:
            errors.append(
                f"size mismatch for {prefix}{name}: copying a param with shape {value.shape} from checkpoint, "
                f"the shape in current model is {torch.Size(shape)}."
            )
        return fits

    def extra_repr(self) -> str:
        packed = ", packed" if self.is_packed else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, groups={self.groups}, "
            f"bias={self.bias is not None}, variant={self.variant!r}{packed}"
        )
