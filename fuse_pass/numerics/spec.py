"""Which tensors of a layer are quantised, and how: plain data, shared by layers, `convert` and the backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

from fuse_pass.numerics.formats import Format, Granularity, as_format
from fuse_pass.numerics.rounding import as_rounding

SITES = ("input", "weight", "bias", "output", "state", "grad")
SCALES = ("dynamic", "static", "learned")


@dataclass(frozen=True)
class Site:
    """How one tensor is quantised.

    Args:
        format: a format or its name.
        rounding: rounding mode by name or number, e.g. `"nearest"` or 1.
        granularity: which elements share a scale; for formats with a scale.
        clip_grad: whether the gradient is 0 where the value saturates, instead of passing straight through.
        scale: where the scale comes from, for integers and floating point. None: integers take theirs from each tensor
            until `calibrate` has set it, floating point has none. "dynamic": always from the tensor, by absmax.
            "static": from `calibrate`, without which forward raises. "learned": a parameter, for integers
            (1902.08153); it starts from `calibrate`, that of a single weight from the weight itself.

    Raises:
        ValueError: an unknown scale, or one that the format has no use for.
    """

    format: Format
    _: KW_ONLY
    rounding: str = "nearest"
    granularity: Granularity = Granularity()  # noqa: RUF009  # frozen
    clip_grad: bool = False
    scale: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", as_format(self.format))
        object.__setattr__(self, "rounding", as_rounding(self.rounding))
        if self.scale is None:
            return
        if self.scale not in SCALES:
            raise ValueError(f"unknown scale {self.scale!r} of a Site; valid are {', '.join(SCALES)} and None")
        if not self.format.scales:
            raise ValueError(f"{self.format.name} brings its own scale; got scale={self.scale!r}")
        if self.scale not in self.format.scales:
            raise ValueError(f"only integers have a {self.scale} scale, not {self.format.name}")

    def of_rows(self) -> Site:
        """The same for rows that were looked up in a table: a scale per row of the table is one per row here."""
        is_per_row = self.granularity == Granularity("channel", axis=0)
        return replace(self, granularity=Granularity("token")) if is_per_row else self

    @property
    def is_idempotent(self) -> bool:
        """Whether quantising twice is quantising once, bit for bit: not where a scale comes from the tensor."""
        return self.scale is None and self.format.default_scale is None

    @property
    def needs_scale(self) -> bool:
        """Whether forward can do nothing before a scale is set."""
        return self.scale in ("static", "learned")

    @property
    def takes_scale(self) -> bool:
        """Whether a scale that is set is used."""
        return self.needs_scale or (self.scale is None and self.format.default_scale is not None)

    @property
    def may_learn_scale(self) -> bool:
        """Whether the scale, whose source is left open, could be a parameter."""
        return self.scale is None and "learned" in self.format.scales


@dataclass(frozen=True)
class QuantSpec:
    """What is quantised in a layer; None leaves a tensor as it is.

    Every site takes a `Site`, a format, or the name of one. `QuantSpec.uniform` sets the usual ones at once.

    Args:
        input: what enters the layer (for attention: query, key and value).
        weight: weights; the master weights stay in their own dtype.
        bias: biases.
        output: the result of the layer's arithmetic (for attention also projections, scores and probabilities).
        state: hidden and cell state of recurrent layers, at every step.
        grad: the gradient that enters the layer in backward.
        rounding: rounding mode of the sites that are given without one.
    """

    input: Any = None
    weight: Any = None
    bias: Any = None
    output: Any = None
    state: Any = None
    grad: Any = None
    _: KW_ONLY
    rounding: int | str = "nearest"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounding", as_rounding(self.rounding))
        for name in SITES:
            object.__setattr__(self, name, self._site(name, getattr(self, name)))

    def _site(self, name: str, value: Any) -> Site | None:
        if isinstance(value, Site) and name == "grad" and value.needs_scale:
            raise ValueError(f"QuantSpec.grad: the scale of a gradient is dynamic, got scale={value.scale!r}")
        if value is None or isinstance(value, Site):
            return value
        try:
            return Site(value, rounding=str(self.rounding))
        except TypeError as error:
            raise TypeError(f"QuantSpec.{name}: {error}") from error

    @classmethod
    def uniform(cls, format: Format | str, rounding: int | str = "nearest") -> QuantSpec:
        """One format for everything in forward.

        Integers come with absmax scales: inputs per tensor, weights per output channel. There, as integer kernels have
        it, biases and outputs stay in floating point.
        """
        fmt = as_format(format)
        if fmt.default_scale is not None:
            per_channel = Site(fmt, rounding=str(as_rounding(rounding)), granularity=Granularity("channel", axis=0))
            return cls(input=fmt, weight=per_channel, state=fmt, rounding=rounding)
        return cls(fmt, fmt, fmt, fmt, fmt, rounding=rounding)

    def __str__(self) -> str:
        parts = {name: site for name in SITES if (site := getattr(self, name)) is not None}
        names = {site.format.name for site in parts.values()}
        if len(names) == 1:
            return f"{names.pop()} ({', '.join(parts)})"
        return ", ".join(f"{name} {site.format.name}" for name, site in parts.items()) or "nothing"


def spec_of(value: QuantSpec | Format | str | Mapping[str, Any]) -> QuantSpec:
    """A spec from itself, from a format or its name (`QuantSpec.uniform`), or from a mapping of sites."""
    if isinstance(value, QuantSpec):
        return value
    if isinstance(value, Mapping):
        known = {field.name for field in fields(QuantSpec)} - {"_"}
        for name in value:
            if name not in known:
                raise ValueError(f"unknown site {name!r} of a QuantSpec; valid are {', '.join(sorted(known))}")
        return QuantSpec(**value)
    return QuantSpec.uniform(value)
