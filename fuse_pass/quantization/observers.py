"""Observers: see tensors, one after the other, and tell the scale (and zero point) for a format.

    minmax          everything seen fits                                                      1712.05877 §3
    moving_average  as minmax, but ends follow the batches: end ← end + momentum·(new − end)   1712.05877 §3.1
    percentile      a given share of each tail saturates
    mse             the threshold with the least squared error, by search
    lsq             2·mean|x| / sqrt(quant_max), where learned scales start                    1902.08153 §2.1

Groups that share a scale are the rows of a matrix `[groups, elements]`; the scale gets the shape that `Granularity`
tells, `[]` for one that all share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fuse_pass.numerics.formats import Format, Granularity, QParams, as_format
from fuse_pass.numerics.rounding import compute_carrier
from fuse_pass.quantization.functional import fake_quantize


class Observer:
    """What all observers share: which elements belong together, and the way from a range to a scale.

    Args:
        granularity: which elements share a scale.
    """

    def __init__(self, granularity: Granularity | str = "tensor") -> None:
        self.granularity = Granularity(granularity) if isinstance(granularity, str) else granularity
        self._shape: tuple[int, ...] | None = None

    def observe(self, x: Tensor) -> None:
        """Takes `x [...]` into account; an empty tensor changes nothing.

        Raises:
            ValueError: x holds NaN or infinity, or has other groups than the tensors before it.
        """
        if x.numel() == 0:
            return
        rows, shape = _rows(x.detach(), self.granularity)
        if not torch.isfinite(rows).all():
            raise ValueError("NaN or infinity, from which no scale can be taken")
        if self._shape is not None and math.prod(shape) != math.prod(self._shape):
            raise ValueError(
                f"scales of shape {shape} after {self._shape}: the groups of granularity {self.granularity.kind!r} "
                "must not depend on the batch"
            )
        first, self._shape = self._shape is None, self._shape or shape
        self._update(rows, first)

    def scale_and_zero_point(self, fmt: Format | str) -> QParams:
        """The scale, float32 or float64, for an integer or floating-point format; int32 zero point if asymmetric.

        Raises:
            ValueError: nothing was observed, or a format without a scale.
        """
        fmt = as_format(fmt)
        if not fmt.scales:
            raise ValueError(f"{fmt.name} brings its own scale")
        if self._shape is None:
            raise ValueError(f"{type(self).__name__}: nothing was observed")
        scale, zero_point = self._choose(fmt)
        shape = self._shape
        return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape).to(torch.int32)

    def _update(self, rows: Tensor, first: bool) -> None:
        raise NotImplementedError

    def _choose(self, fmt: Format) -> QParams:
        """Scale and zero point `[groups]`."""
        raise NotImplementedError


class MinMax(Observer):
    """The smallest and the largest value of everything that was seen."""

    _low: Tensor
    _high: Tensor

    def _update(self, rows: Tensor, first: bool) -> None:
        low, high = rows.amin(1), rows.amax(1)
        self._low = low if first else torch.minimum(self._low, low)
        self._high = high if first else torch.maximum(self._high, high)

    def _choose(self, fmt: Format) -> QParams:
        return fmt.qparams_for(self._low, self._high)


class MovingAverage(MinMax):
    """Smallest and largest value, averaged over the batches so that a single odd one counts less.

    Args:
        granularity: which elements share a scale.
        momentum: weight of the newest batch, above 0 and at most 1.
    """

    def __init__(self, granularity: Granularity | str = "tensor", momentum: float = 0.1) -> None:
        super().__init__(granularity)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must lie above 0 and be at most 1, got {momentum}")
        self.momentum = momentum

    def _update(self, rows: Tensor, first: bool) -> None:
        low, high = rows.amin(1), rows.amax(1)
        self._low = low if first else self._low.lerp(low, self.momentum)
        self._high = high if first else self._high.lerp(high, self.momentum)


class MeanMagnitude(MinMax):
    """2·mean|x| / sqrt(quant_max) for symmetric integers; other formats take the range, as `MinMax`."""

    _total: Tensor
    _count: int

    def _update(self, rows: Tensor, first: bool) -> None:
        super()._update(rows, first)
        total = rows.abs().sum(1, dtype=torch.float64)
        self._total = total if first else self._total + total
        self._count = rows.shape[1] if first else self._count + rows.shape[1]

    def _choose(self, fmt: Format) -> QParams:
        if fmt.has_zero_point or "learned" not in fmt.scales:
            return super()._choose(fmt)
        scale = (2 * self._total / self._count / math.sqrt(fmt.steps)).to(self._low.dtype)
        return torch.where(scale == 0, 1.0, scale), None


class _Sampling(Observer):
    """Keeps values: all of them, or a random part of equal density once there are more than `LIMIT`."""

    LIMIT = 2**18
    LEAST_PER_GROUP = 2**10

    def _update(self, rows: Tensor, first: bool) -> None:
        if first:
            self._kept, self._share = rows[:, :0], 1.0
            # Its own generator: calibration repeats, and does not disturb the caller's random numbers.
            self._generator = torch.Generator().manual_seed(0)
        self._kept = torch.cat((self._kept, self._thinned(rows, self._share)), 1)
        limit = max(self.LIMIT // len(rows), self.LEAST_PER_GROUP)
        while self._kept.shape[1] > limit:
            self._share /= 2
            self._kept = self._thinned(self._kept, 0.5)

    def _thinned(self, rows: Tensor, share: float) -> Tensor:
        if share == 1:
            return rows
        # At random and not every n-th: neighbours lie a channel apart, and one channel often holds the outliers.
        chosen = torch.rand(rows.shape[1], generator=self._generator) < share
        return rows[:, chosen.to(rows.device)]


class Percentile(_Sampling):
    """The range without the ends of both tails.

    Args:
        granularity: which elements share a scale.
        percent: share of the values below the upper and above the lower end, above 50 and at most 100.
    """

    def __init__(self, granularity: Granularity | str = "tensor", percent: float = 99.99) -> None:
        super().__init__(granularity)
        if not 50 < percent <= 100:
            raise ValueError(f"percent must lie above 50 and be at most 100, got {percent}")
        self.percent = percent

    def _choose(self, fmt: Format) -> QParams:
        ordered, upper = self._kept.sort(1).values, self.percent / 100
        return fmt.qparams_for(_quantile(ordered, 1 - upper), _quantile(ordered, upper))


class MSE(_Sampling):
    """The threshold at which values saturate with the least squared error of what was seen.

    Thresholds go down from the largest magnitude by quarters of a power of two to 2^−12 of it, then finer around the
    best; every group has its own.
    """

    def _choose(self, fmt: Format) -> QParams:
        low, high = self._kept.aminmax(dim=1)
        largest = torch.maximum(-low, high)

        def fitting(exponent: Tensor) -> QParams:
            threshold = largest * torch.exp2(-exponent)
            return fmt.qparams_for(torch.maximum(low, -threshold), torch.minimum(high, threshold))

        best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
        coarse = [torch.full_like(largest, quarters / 4) for quarters in range(49)]
        best, least = self._least(fitting, fmt, coarse, best, least)
        fine = [(best + parts / 32).clamp(min=0) for parts in range(-7, 8) if parts]
        best, _ = self._least(fitting, fmt, fine, best, least)
        return fitting(best)

    def _least(
        self,
        fitting: Callable[[Tensor], QParams],
        fmt: Format,
        exponents: list[Tensor],
        best: Tensor,
        least: Tensor,
    ) -> tuple[Tensor, Tensor]:
        by_row = Granularity("channel", axis=0)
        for exponent in exponents:
            scale, zero_point = fitting(exponent)
            step, zero = scale.unsqueeze(1), None if zero_point is None else zero_point.unsqueeze(1)
            rounded = fake_quantize(self._kept, fmt, granularity=by_row, scale=step, zero_point=zero)
            error = (rounded - self._kept).square().sum(1)
            best, least = torch.where(error < least, exponent, best), torch.minimum(error, least)
        return best, least


OBSERVERS: Mapping[str, type[Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MSE,
    "lsq": MeanMagnitude,
}
"""Every observer by its name."""


def as_observer(name: str | Callable[[Granularity], Observer]) -> Callable[[Granularity], Observer]:
    """The class of that name; a class, or any function that makes an observer of a granularity, is itself.

    Raises:
        ValueError: an unknown name; the message lists the valid ones.
        TypeError: neither a name nor callable.
    """
    if callable(name):
        return name
    if not isinstance(name, str):
        raise TypeError(f"expected the name of an observer or what makes one, got {name!r}")
    if name not in OBSERVERS:
        raise ValueError(f"unknown observer {name!r}; valid names are {', '.join(OBSERVERS)}")
    return OBSERVERS[name]


def _rows(x: Tensor, granularity: Granularity) -> tuple[Tensor, tuple[int, ...]]:
    """The groups of x as `[groups, elements]`, short ones with the last element repeated, and the scales' shape."""
    x = x.to(compute_carrier(x.dtype).dtype)
    if granularity.kind == "tensor":
        return x.reshape(1, -1), ()  # of any number of dimensions
    if granularity.kind == "channel":
        assert granularity.axis is not None
        rows = x.movedim(granularity.axis, 0).flatten(1) if x.dim() > 1 else x.unsqueeze(1)
        shape = [1] * x.dim()
        shape[granularity.axis] = -1
        return rows, tuple(x.new_empty(len(rows)).view(shape).shape)
    if granularity.kind == "token":
        return x.reshape(-1, x.shape[-1]), (*x.shape[:-1], 1)
    assert granularity.size is not None
    groups = -(-x.shape[-1] // granularity.size)
    index = torch.arange(groups * granularity.size, device=x.device).clamp(max=x.shape[-1] - 1)
    return x[..., index].reshape(-1, granularity.size), (*x.shape[:-1], groups, 1)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Linear between neighbours, `[groups]`; `torch.quantile` refuses many groups."""
    position = share * (ordered.shape[1] - 1)
    below = int(position)
    above = min(below + 1, ordered.shape[1] - 1)
    return ordered[:, below].lerp(ordered[:, above], position - below)
