"""The settings of a compilation, checked once: what `FuseBackend`, `fuse_pass.compile` and `options=` are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from fuse_pass.joint.recompute import MEMORY
from fuse_pass.numerics.formats import Format
from fuse_pass.numerics.spec import QuantSpec, spec_of
from fuse_pass.patterns import PATTERNS

PATTERN_NAMES = tuple(pattern.name for pattern in PATTERNS)


@dataclass(frozen=True)
class Options:
    """What `FuseBackend` documents; made by `Options.of`.

    Attributes:
        patterns: names of the patterns to apply, in the order in which they are.
        quantize: what is quantised, and how; None for nothing.
        memory: what a feed-forward block keeps for backward.
        prepack: whether large weights are kept packed too.
        strict: whether a pass that fails raises.
    """

    patterns: tuple[str, ...] = PATTERN_NAMES
    quantize: QuantSpec | None = None
    memory: str = "balanced"
    prepack: bool = False
    strict: bool = False

    @classmethod
    def of(
        cls,
        patterns: Iterable[str] | None = None,
        quantize: QuantSpec | Format | str | None = None,
        **others: Any,
    ) -> Self:
        """As users write them: names in any order, a format for a spec.

        Raises:
            ValueError: an unknown pattern or setting of `memory`, a spec that only layers can follow.
            TypeError: patterns that are no collection of names, a flag that is no bool.
        """
        names = PATTERN_NAMES if patterns is None else _names(patterns)
        spec = None if quantize is None else spec_of(quantize)
        return cls(tuple(name for name in PATTERN_NAMES if name in names), spec, **others)

    def __post_init__(self) -> None:
        for name in ("prepack", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if self.memory not in MEMORY:
            raise ValueError(f"unknown setting {self.memory!r} of memory; valid are {', '.join(MEMORY)}")
        if self.quantize is not None:
            _require_stateless(self.quantize)

    def as_dict(self) -> dict[str, Any]:
        """By name, in order."""
        return {name: getattr(self, name) for name in names()}

    def updated(self, given: Mapping[str, Any]) -> Self:
        """The same with some of them anew."""
        return self.of(**{**self.as_dict(), **given})


def names() -> tuple[str, ...]:
    """Of all options."""
    return tuple(field.name for field in dataclasses.fields(Options))


def _names(patterns: Any) -> tuple[str, ...]:
    """The names of patterns; ValueError where one is unknown, TypeError where they are no collection of names."""
    example = PATTERN_NAMES[-1]
    if isinstance(patterns, str):
        raise TypeError(f"patterns: expected a collection of names such as [{patterns!r}], got the string {patterns!r}")
    if isinstance(patterns, (bytes, bytearray)) or not isinstance(patterns, Iterable):
        raise TypeError(f"patterns: expected a collection of names such as ['{example}'], got {patterns!r}")
    given = tuple(patterns)
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"patterns: expected names such as '{example}', got {name!r}")
        if name not in PATTERN_NAMES:
            raise ValueError(f"unknown pattern {name!r}; valid names are {', '.join(PATTERN_NAMES)}")
    return given


def _require_stateless(spec: QuantSpec) -> None:
    """A graph has no place for what layers keep or do in backward."""
    if spec.grad is not None:
        raise ValueError(
            "quantize: gradients are quantised in layers only; expected a QuantSpec with grad=None, "
            "or use fuse_pass.convert"
        )
    for name in ("input", "weight", "bias", "output"):
        site = getattr(spec, name)
        if site is not None and site.needs_scale:
            raise ValueError(
                f"quantize: a {site.scale} scale belongs to a layer; expected scale=None or 'dynamic' for {name}, "
                "or use fuse_pass.convert and fuse_pass.calibrate"
            )
