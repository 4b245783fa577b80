"""Dropout → [add residual] → LayerNorm or RMSNorm as one op.

    z = dropout(x) + residual                 (either part may be absent)
    y = (z - mean(z)) * rsqrt(var(z) + eps) * weight + bias        LayerNorm, 1607.06450
    y = z * rsqrt(mean(z²) + eps) * weight                         RMSNorm, 1910.07467

Shapes: x, residual, z and y `[..., *normalized]`, weight and bias `[*normalized]`, statistics `[2, ..., 1, …]`: the
mean (0 for RMSNorm) and rstd. Variance is biased; statistics are float32 (float64 for float64). Saved for backward are
z, the statistics and the seed; the mask is recomputed. `norm_dtype` is what z is cast to before the norm, and the dtype
of y (None: z's own): the cast that many models write there, and the one that CUDA autocast makes. With a `sum_format`
(`ops.packed_format`) the norm reads z rounded, straight through, before that cast; the result z stays as it is.
`round_normalised` casts to the dtype of y before weight and bias, as Llama does; gradients do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fuse_pass.inductor import compat
from fuse_pass.numerics import random_bits
from fuse_pass.numerics.tensors import accumulation_dtype
from fuse_pass.ops.arguments import Seed
from fuse_pass.ops.fused_op import FusedOp, Gradients, register
from fuse_pass.ops.packed_format import quantize_packed, straight_through_packed

LAYER_NORM, RMS_NORM = "layer_norm", "rms_norm"

# Inductor sums over rows one column of vectors at a time. In blocks that stay in the cache this takes less than half as
# long (gradients of weight and bias, 8192x768 float32: 1.7 against 3.7 ms).
_ROWS_PER_BLOCK = 16

# Of the mean, the first estimate of it: the roundings of a sum may not carry it beyond the largest number.
_SHORT = 1 - 2.0**-14
# Of a row, where it is only known at run time: so many elements of the largest size may be added.
_USUAL_SIZE = 2**13


@dataclass(frozen=True)
class Settings:
    """Dropout and norm over the last `normalized_dims` dimensions, which are one row."""

    seed: Seed | None
    p: float
    eps: float
    normalized_dims: int
    norm: str
    norm_dtype: torch.dtype | None
    residual_first: bool
    sum_format: Sequence[int] = ()
    round_normalised: bool = False

    @property
    def drops(self) -> bool:
        return self.seed is not None and self.p != 0

    @property
    def dims(self) -> list[int]:
        return list(range(-self.normalized_dims, 0))

    def rows_of(self, z: Tensor) -> torch.Size:
        return z.shape[: z.dim() - self.normalized_dims]

    def row_of(self, z: Tensor) -> torch.Size:
        return z.shape[z.dim() - self.normalized_dims :]

    def dtype_of(self, z: Tensor) -> torch.dtype:
        """In which y comes."""
        return self.norm_dtype or z.dtype

    def dropped(self, x: Tensor) -> Tensor:
        """The mask is counted along the rows; the strides stay those of x, as in `F.dropout`."""
        if self.seed is None or self.p == 0:
            return x
        if self.p == 1:
            return torch.zeros_like(x)
        rows, columns = math.prod(self.rows_of(x)), math.prod(self.row_of(x))
        return random_bits.keep_only(x, random_bits.keep_mask(self.seed, rows, columns, self.p), self.p)

    def added(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The order of the operands decides the strides of a sum of tensors that are laid out differently."""
        if residual is None:
            return x
        return residual + x if self.residual_first else x + residual

    def normalised(self, z: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """y and the statistics."""
        dtype, size = self.dtype_of(z), math.prod(self.row_of(z))
        wide = z.to(dtype).to(accumulation_dtype(dtype))
        mean = _mean(wide, self.dims, size) if self.norm == LAYER_NORM else None
        wide = wide if mean is None else wide - mean
        variance = _share((wide * wide).sum(self.dims, keepdim=True), size)
        y = wide * torch.rsqrt(variance + self.eps)
        y = y.to(dtype) if self.round_normalised else y
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        return y.to(dtype).contiguous(), _statistics(mean, variance, self.eps)


def _mean(wide: Tensor, dims: list[int], size: Any) -> Tensor:
    """Means of the rows, in two steps: an estimate, and the mean of what it leaves.

    For a constant row the second step is exact to far less than an ulp of the result, which is the row's own value: the
    normalised row is 0, and no rounding is left to be divided by the root of eps. The variance is then a mean of
    squares and not below 0, as `mean(x²) - mean(x)²` could be. The estimate sums elements that are divided already and
    falls a little short, so that no sum is larger than the largest element: it does not overflow. The rest is divided
    after the sum, or the smallest numbers would lose their bits. It does not overflow either: where a distance from the
    estimate is limited, its square is infinite, and so is the variance. (Not so in rows of more than 16384 equal
    numbers that are within that factor of the largest, `2**14 / size`.)
    """
    estimate = _share(wide, size, _SHORT).sum(dims, keepdim=True)
    limit = torch.finfo(wide.dtype).max / (size if isinstance(size, int) and size else _USUAL_SIZE)
    rest = (wide - estimate).clamp(-limit, limit).sum(dims, keepdim=True)
    return estimate + _share(rest, size)


def _share(total: Tensor, size: Any, of: float = 1.0) -> Tensor:
    """`total * of / size`, by a product where it can be, as Inductor divides anew for each vector."""
    return total * (of / size) if isinstance(size, int) and size else total * of / size


def _statistics(mean: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """Mean and rstd for backward, `[2, *variance.shape]`.

    One tensor of two rows, which Inductor computes for a CPU in a loop of its own. Two tensors with an element per row
    would be computed between the steps on z, each of which would then be a pass over memory (3.8 against 3.2 ms,
    8192x768). On a GPU a loop of its own is another launch, and the kernel that reduces a row writes its two elements.
    """
    rstd = torch.rsqrt(variance + eps)
    if rstd.device.type != "cpu":
        # 0 as a function of the row: a constant would be written by a kernel of its own.
        return torch.stack((variance.clamp(max=0) if mean is None else mean, rstd))
    is_mean = torch.arange(2, device=rstd.device).view(2, *(1,) * rstd.dim()) == 0
    return torch.where(is_mean, torch.zeros_like(rstd) if mean is None else mean, rstd)


@dataclass(frozen=True)
class DropoutNorm(FusedOp):
    results = ("y", "z", "statistics")
    stores_what_it_keeps = True
    autocast = ("cuda",)

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    settings: Settings

    @property
    def _has_sum(self) -> bool:
        """Whether z is a tensor of its own rather than x itself."""
        return self.residual is not None or self.settings.drops

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns y, z (empty where it would be x itself) and the statistics."""
        x, settings = self.x, self.settings
        z = settings.added(settings.dropped(x), self.residual)
        if _is_empty(z):
            return self._of_nothing(z)
        if settings.seed is not None and 0 < settings.p < 1:
            # Inductor makes several loops, each of which would hash anew (0.33 against 0.17 ms, 512x768 on a CPU).
            # Without dropout z is cheaper to add up again than to store, should nobody else want it.
            z = compat.stored_once(z)
        y, statistics = settings.normalised(quantize_packed(z, settings.sum_format), self.weight, self.bias)
        return y, x.new_empty(0) if z is x else z, statistics

    def shapes(self) -> tuple[Tensor, Tensor, Tensor]:
        x, settings = self.x, self.settings
        z = torch.empty_like(x) if self.residual is None else settings.added(x, self.residual)
        if _is_empty(z):
            return self._of_nothing(z)
        dtype = settings.dtype_of(z)
        return (
            x.new_empty(z.shape, dtype=dtype),
            z if self._has_sum else x.new_empty(0),
            x.new_empty(self._shape_of_statistics(z), dtype=accumulation_dtype(dtype)),
        )

    def _of_nothing(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The results without elements: those of arithmetic have strides that fake tensors do not know."""
        dtype = self.settings.dtype_of(z)
        return (
            self.x.new_empty(z.shape, dtype=dtype),
            z.new_empty(z.shape if self._has_sum else 0),
            self.x.new_zeros(self._shape_of_statistics(z), dtype=accumulation_dtype(dtype)),
        )

    def _shape_of_statistics(self, z: Tensor) -> tuple[int, ...]:
        return (2, *self.settings.rows_of(z), *(1,) * self.settings.normalized_dims)

    def with_gradient(self, needed: Set[str]) -> tuple[str, ...]:
        """The parameters of the norm give y a gradient, not the sum."""
        return ("y", "z") if self._has_sum and needed & {"x", "residual"} else ("y",)

    def saved(self, results: tuple[Tensor, ...], needed: Set[str]) -> DropoutNormGradients:
        _, z, statistics = results
        z = z if self._has_sum else self.x
        # On a CPU autograd makes the cast, after the op.
        x_dtype = None if z.device.type == "cpu" else self.x.dtype
        return DropoutNormGradients(z, statistics, self.weight, x_dtype, self.settings)

    def under_autocast(self, device_type: str) -> DropoutNorm:
        """CUDA autocast runs norms in float32; CPU autocast leaves them alone."""
        x, residual = self.x, self.residual
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        if self.settings.norm_dtype is None and dtype in (torch.float16, torch.bfloat16):
            return replace(self, settings=replace(self.settings, norm_dtype=torch.float32))
        return self


def _is_empty(z: Tensor) -> bool:
    """False where that is only known at run time."""
    elements = z.numel()
    return isinstance(elements, int) and elements == 0


@dataclass(frozen=True)
class DropoutNormGradients(Gradients):
    """The gradient of the residual, and without dropout of x, is that of z. That of x comes in `x_dtype`, or without
    one in the dtype of z; those of weight and bias in the accumulation dtype.
    """

    of = ("z", "x", "weight", "bias")
    grads = ("grad_y", "grad_z")

    z: Tensor
    statistics: Tensor
    weight: Tensor | None
    x_dtype: torch.dtype | None
    settings: Settings

    def sources(self, needed: Set[str], *grads: Tensor | None) -> dict[str, str]:
        found = {"x": "x" if self.settings.drops else "z", "residual": "z"}
        if grads[0] is not None:  # else nobody has read y: as in eager, parameters have no gradient, not one of zeros
            found |= {"weight": "weight", "bias": "bias"}
        return {name: source for name, source in found.items() if name in needed}

    def backward(self, needed: Set[str], grad_y: Tensor | None, grad_z: Tensor | None) -> dict[str, Tensor]:
        z, settings, grads = self.z, self.settings, {}
        dtype = settings.dtype_of(z)
        wide = accumulation_dtype(dtype)
        if grad_y is None:
            assert grad_z is not None
            grad = grad_z
            for name in needed & {"weight", "bias"}:
                grads[name] = z.new_zeros(settings.row_of(z), dtype=wide)
        else:
            normalised = quantize_packed(z, settings.sum_format).to(dtype).to(wide)
            mean, rstd = self.statistics
            normalised = (normalised - mean if settings.norm == LAYER_NORM else normalised) * rstd
            grad_normalised = grad_y.to(wide)
            rows = list(range(len(settings.rows_of(z))))
            if "weight" in needed:
                grads["weight"] = _sum(grad_normalised * normalised, rows)
            if "bias" in needed:
                grads["bias"] = _sum(grad_normalised, rows).clone()  # may alias neither an argument nor a result
            if self.weight is not None:
                grad_normalised = grad_normalised * self.weight
            dims, size = settings.dims, math.prod(settings.row_of(z))
            projection = _share((grad_normalised * normalised).sum(dims, keepdim=True), size)
            if settings.norm == LAYER_NORM:  # first, while the two are of one magnitude and the difference is exact
                grad_normalised = grad_normalised - _share(grad_normalised.sum(dims, keepdim=True), size)
            grad = grad_normalised - normalised * projection
            grad = (grad * rstd).to(dtype).to(z.dtype)
            grad = grad if grad_z is None else grad + grad_z
        if "x" in needed:
            of_x = settings.dropped(grad).contiguous()
            # In the shape of x: else a kernel of its own drops, and casts into the shape that a product asks for.
            grads["x"] = of_x if self.x_dtype is None else compat.stored_once(of_x.to(self.x_dtype))
        if "z" in needed:
            grads["z"] = grad.clone(memory_format=torch.contiguous_format)
        return grads

    def differentiable(self, needed: Set[str], grad_y: Tensor | None, grad_z: Tensor | None) -> dict[str, Tensor]:
        """By `torch.func.vjp`, which takes z and the weight as independent; in the graph one op made both."""
        z, grad, grads = self.z, grad_z, {}
        settings = replace(self.settings, round_normalised=False)
        if grad_y is not None:
            parameters = () if self.weight is None else (self.weight,)
            seen = straight_through_packed(z, settings.sum_format)
            _, vjp = torch.func.vjp(  # type: ignore[misc]  # 2 results without aux
                lambda z, weight=None: settings.normalised(z, weight, None)[0], seen, *parameters
            )
            grad, *of_weight = vjp(grad_y)
            grad = grad if grad_z is None else grad + grad_z
            grads = dict(zip(("weight",), of_weight, strict=False))
            grads["bias"] = _sum(grad_y, list(range(len(settings.rows_of(z)))))
        assert grad is not None
        return {**grads, "z": grad, "x": settings.dropped(grad)}

    def like(self, name: str, grad_y: Tensor | None, grad_z: Tensor | None) -> Tensor:
        if name in ("z", "x"):
            return self.z.new_empty(self.z.shape, dtype=self.x_dtype if name == "x" else None)
        return self.z.new_empty(self.settings.row_of(self.z), dtype=accumulation_dtype(self.settings.dtype_of(self.z)))


def _sum(x: Tensor, dims: list[int]) -> Tensor:
    """Sums over the leading `dims`."""
    if not dims:
        return x.clone()  # an empty list would mean every dimension
    rows = math.prod(x.shape[: len(dims)])
    if x.device.type != "cpu" or not isinstance(rows, int) or rows < 2 * _ROWS_PER_BLOCK:
        return x.sum(dims)
    x = x.flatten(0, len(dims) - 1)
    whole = rows - rows % _ROWS_PER_BLOCK
    blocks = x[:whole].reshape(whole // _ROWS_PER_BLOCK, _ROWS_PER_BLOCK, *x.shape[1:]).sum(1).sum(0)
    return blocks if whole == rows else blocks + x[whole:].sum(0)


dropout_norm = register("dropout_norm", DropoutNorm, DropoutNormGradients)
