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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuse_pass.inductor import compat
from fuse_pass.ops import rng
from fuse_pass.ops.library import accumulation_dtype, define, define_autocast, define_autograd, placeholders
from fuse_pass.ops.packed_format import quantize_packed, straight_through_packed

LAYER_NORM, RMS_NORM = "layer_norm", "rms_norm"

# Inductor sums over rows one column of vectors at a time. In blocks that stay in the cache this takes less than half as
# long (gradients of weight and bias, 8192x768 float32: 1.7 against 3.7 ms).
_ROWS_PER_BLOCK = 16

# Of the mean, the first estimate of it: the roundings of a sum may not carry it beyond the largest number.
_SHORT = 1 - 2.0**-14
# Of a row, where it is only known at run time: so many elements of the largest size may be added.
_USUAL_SIZE = 2**13


def _split(x: Tensor, normalized_dims: int) -> tuple[int, int]:
    """Sizes of x seen as a matrix `[rows, columns]` of independently normalised rows."""
    return math.prod(x.shape[: x.dim() - normalized_dims]), math.prod(x.shape[x.dim() - normalized_dims :])


def _last_dims(normalized_dims: int) -> list[int]:
    return list(range(-normalized_dims, 0))


def _dropout(x: Tensor, seed: Tensor | None, p: float, normalized_dims: int) -> Tensor:
    """Dropout whose mask is counted along the normalised rows; keeps the strides of x, as `F.dropout` does."""
    if seed is None or p == 0:
        return x
    if p == 1:
        return torch.zeros_like(x)
    return rng.keep_only(x, rng.keep_mask(seed, *_split(x, normalized_dims), p), p)


def _normalise(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    normalized_dims: int,
    norm: str,
    dtype: torch.dtype,
    round_normalised: bool = False,
) -> tuple[Tensor, Tensor]:
    dims = _last_dims(normalized_dims)
    wide = z.to(dtype).to(accumulation_dtype(dtype))
    size = math.prod(z.shape[-normalized_dims:])
    mean = _mean(wide, dims, size) if norm == LAYER_NORM else None
    wide = wide if mean is None else wide - mean
    variance = _share((wide * wide).sum(dims, keepdim=True), size)
    y = wide * torch.rsqrt(variance + eps)
    y = y.to(dtype) if round_normalised else y
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(dtype).contiguous(), _statistics(mean, variance, eps)


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

    One tensor of two rows, which Inductor computes in a loop of its own. Two tensors with an element per row would be
    computed between the steps on z, each of which would then be a pass over memory (3.8 against 3.2 ms, 8192x768).
    """
    rstd = torch.rsqrt(variance + eps)
    is_mean = torch.arange(2, device=rstd.device).view(2, *(1,) * rstd.dim()) == 0
    return torch.where(is_mean, torch.zeros_like(rstd) if mean is None else mean, rstd)


def _add(x: Tensor, residual: Tensor | None, residual_first: bool) -> Tensor:
    """The order of the operands decides the strides of a sum of tensors that are laid out differently."""
    if residual is None:
        return x
    return residual + x if residual_first else x + residual


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    normalized_dims: int,
    norm: str,
    norm_dtype: torch.dtype | None,
    residual_first: bool,
    sum_format: Sequence[int] = (),
    round_normalised: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, z (empty where it would be x itself) and the statistics."""
    z = _dropout(x, seed, p, normalized_dims)
    z = _add(z, residual, residual_first)
    if _is_empty(z):
        return _of_nothing(x, z, norm_dtype, normalized_dims, _has_sum(residual, seed, p))
    if seed is not None and 0 < p < 1 and z.device.type == "cpu":
        # Inductor makes three loops for a CPU, each of which would hash anew (0.33 against 0.17 ms, 512x768). Without
        # dropout z is cheaper to add up again than to store, should nobody else want it.
        z = compat.stored_once(z)
    seen = quantize_packed(z, sum_format)
    dtype = norm_dtype or z.dtype
    y, statistics = _normalise(seen, weight, bias, eps, normalized_dims, norm, dtype, round_normalised)
    return y, x.new_empty(0) if z is x else z, statistics


def _is_empty(z: Tensor) -> bool:
    """False where that is only known at run time."""
    elements = z.numel()
    return isinstance(elements, int) and elements == 0


def _of_nothing(
    x: Tensor, z: Tensor, norm_dtype: torch.dtype | None, normalized_dims: int, has_sum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The results without elements. What arithmetic makes of such tensors has strides that fake tensors do not know."""
    dtype = norm_dtype or z.dtype
    rows = z.shape[: z.dim() - normalized_dims]
    return (
        x.new_empty(z.shape, dtype=dtype),
        z.new_empty(z.shape if has_sum else 0),
        x.new_zeros((2, *rows, *(1,) * normalized_dims), dtype=accumulation_dtype(dtype)),
    )


def _backward(
    grad_y: Tensor | None,
    grad_z: Tensor | None,
    z: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    normalized_dims: int,
    norm: str,
    norm_dtype: torch.dtype | None,
    output_mask: list[bool],
    sum_format: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, x (where dropout is active), weight and bias; an empty tensor where `output_mask` is False.

    The gradients of weight and bias come in the accumulation dtype.
    """
    need_z, need_x, need_weight, need_bias = output_mask
    dtype = norm_dtype or z.dtype
    wide = accumulation_dtype(dtype)
    rows = list(range(z.dim() - normalized_dims))
    no_z, no_x, no_weight, no_bias = placeholders(z, 4)
    grad_weight, grad_bias = no_weight, no_bias
    if grad_y is None:
        assert grad_z is not None
        grad = grad_z
        if need_weight or need_bias:
            grad_weight = grad_bias = z.new_zeros(z.shape[z.dim() - normalized_dims :], dtype=wide)
    else:
        normalised = quantize_packed(z, sum_format).to(dtype).to(wide)
        mean, rstd = statistics
        normalised = (normalised - mean if norm == LAYER_NORM else normalised) * rstd
        grad_normalised = grad_y.to(wide)
        if need_weight:
            grad_weight = _sum(grad_normalised * normalised, rows)
        if need_bias:
            grad_bias = _sum(grad_normalised, rows)
        if weight is not None:
            grad_normalised = grad_normalised * weight
        dims = _last_dims(normalized_dims)
        size = math.prod(z.shape[-normalized_dims:])
        projection = _share((grad_normalised * normalised).sum(dims, keepdim=True), size)
        if norm == LAYER_NORM:  # first, while the two are of one magnitude and the difference is exact
            grad_normalised = grad_normalised - _share(grad_normalised.sum(dims, keepdim=True), size)
        grad = grad_normalised - normalised * projection
        grad = (grad * rstd).to(dtype).to(z.dtype)
        grad = grad if grad_z is None else grad + grad_z
    grad_x = _dropout(grad, seed, p, normalized_dims) if need_x else no_x
    # Results of an op may alias neither its arguments nor each other.
    return (
        grad.clone(memory_format=torch.contiguous_format) if need_z else no_z,
        grad_x.contiguous(),
        grad_weight if need_weight else no_weight,
        grad_bias.clone() if need_bias else no_bias,
    )


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


def _has_sum(residual: Tensor | None, seed: Tensor | None, p: float) -> bool:
    """Whether z is a tensor of its own rather than x itself."""
    return residual is not None or (seed is not None and p != 0)


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Any,
    bias: Any,
    seed: Tensor | None,
    p: float,
    eps: Any,
    normalized_dims: int,
    norm: str,
    norm_dtype: torch.dtype | None,
    residual_first: bool,
    sum_format: Sequence[int] = (),
    round_normalised: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.empty_like(x) if residual is None else _add(x, residual, residual_first)
    if _is_empty(z):
        return _of_nothing(x, z, norm_dtype, normalized_dims, _has_sum(residual, seed, p))
    dtype = norm_dtype or z.dtype
    rows = z.shape[: z.dim() - normalized_dims]
    return (
        x.new_empty(z.shape, dtype=dtype),
        z if _has_sum(residual, seed, p) else x.new_empty(0),
        x.new_empty((2, *rows, *(1,) * normalized_dims), dtype=accumulation_dtype(dtype)),
    )


def _fake_backward(
    grad_y: Any,
    grad_z: Any,
    z: Tensor,
    statistics: Any,
    weight: Any,
    seed: Any,
    p: Any,
    normalized_dims: int,
    norm: str,
    norm_dtype: torch.dtype | None,
    output_mask: list[bool],
    sum_format: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    wide = accumulation_dtype(norm_dtype or z.dtype)
    parameter = z.shape[z.dim() - normalized_dims :]
    shapes = ((z.shape, z.dtype), (z.shape, z.dtype), (parameter, wide), (parameter, wide))
    return tuple(
        z.new_empty(shape, dtype=dtype) if needed else z.new_empty(0)
        for (shape, dtype), needed in zip(shapes, output_mask, strict=True)
    )


dropout_norm = define(
    "dropout_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float p, float eps, int normalized_dims, "
    "str norm, ScalarType? norm_dtype, bool residual_first, int[] sum_format=[], "
    "bool round_normalised=False) -> (Tensor y, Tensor z, Tensor statistics)",
    _forward,
    _fake,
)
dropout_norm_backward = define(
    "dropout_norm_backward",
    "(Tensor? grad_y, Tensor? grad_z, Tensor z, Tensor statistics, Tensor? weight, Tensor? seed, float p, "
    "int normalized_dims, str norm, ScalarType? norm_dtype, bool[4] output_mask, int[] sum_format=[]) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, seed, ctx.p, ctx.eps, ctx.normalized_dims, ctx.norm, ctx.norm_dtype, _ = inputs[:11]
    ctx.formats = inputs[11:12]
    _, z, statistics = output
    ctx.drops = seed is not None and ctx.p != 0
    ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
    has_sum = _has_sum(residual, seed, ctx.p)
    ctx.save_for_backward(z if has_sum else x, statistics, weight, seed)
    # The parameters of the norm give y a gradient, not the sum.
    differentiable_sum = has_sum and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
    ctx.mark_non_differentiable(statistics, *(() if differentiable_sum else (z,)))
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    z, statistics, weight, seed = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    none = (None,) * (len(ctx.needs_input_grad) - 4)
    if grad_y is None and grad_z is None:
        return (None,) * 4 + none
    if grad_y is None:  # nobody has read y: as in eager, its parameters have no gradient, which is not one of zeros
        need_weight = need_bias = False
    if torch.is_grad_enabled():
        grad, grad_weight, grad_bias = _differentiable_grads(ctx, grad_y, grad_z, z, weight)
        grad_x = _dropout(grad, seed, ctx.p, ctx.normalized_dims)
    else:
        mask = [need_residual or (need_x and not ctx.drops), need_x and ctx.drops, need_weight, need_bias]
        grad, grad_x, grad_weight, grad_bias = torch.ops.fuse_pass.dropout_norm_backward(
            grad_y, grad_z, z, statistics, weight, seed, ctx.p, ctx.normalized_dims, ctx.norm, ctx.norm_dtype, mask,
            *ctx.formats,
        )  # fmt: skip
        grad_x = grad_x if ctx.drops else grad
    grads = (grad_x, grad, grad_weight, grad_bias)
    return (
        tuple(
            grad.to(dtype) if needed else None
            for grad, needed, dtype in zip(
                grads, (need_x, need_residual, need_weight, need_bias), ctx.dtypes, strict=True
            )
        )
        + none
    )


def _differentiable_grads(
    ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None, z: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that can be differentiated again (`create_graph=True`).

    By `torch.func.vjp`, which takes z and the weight as independent; the graph sees both as children of one op.
    """
    grad = grad_z
    grad_weight = grad_bias = z.new_zeros(z.shape[z.dim() - ctx.normalized_dims :])
    if grad_y is not None:
        parameters = () if weight is None else (weight,)

        def normalise(z: Tensor, weight: Tensor | None = None) -> Tensor:
            dtype = ctx.norm_dtype or z.dtype
            return _normalise(z, weight, None, ctx.eps, ctx.normalized_dims, ctx.norm, dtype)[0]

        seen = straight_through_packed(z, *ctx.formats) if ctx.formats else z
        _, vjp = torch.func.vjp(normalise, seen, *parameters)  # type: ignore[misc]  # 2 results without aux
        grad, *of_weight = vjp(grad_y)
        grad = grad if grad_z is None else grad + grad_z
        grad_weight = of_weight[0] if of_weight else grad_weight
        grad_bias = _sum(grad_y, list(range(z.dim() - ctx.normalized_dims)))
    return grad, grad_weight, grad_bias  # type: ignore[return-value]  # the caller drops what is not needed


def _cuda_autocast(op: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> Any:
    """CUDA autocast runs norms in float32; CPU autocast leaves them alone (so there is no rule for it)."""
    others, (norm_dtype, residual_first, *formats) = rest[:7], rest[7:]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if norm_dtype is None and dtype in (torch.float16, torch.bfloat16):
        norm_dtype = torch.float32
    return op(x, residual, *others, norm_dtype, residual_first, *formats)


define_autograd(dropout_norm, _setup, _autograd)
define_autocast(dropout_norm, "cuda", _cuda_autocast)
