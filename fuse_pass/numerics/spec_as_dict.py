"""A `QuantSpec` as plain data, for files: names, numbers and mappings that JSON can hold, and back.

A format that `fuse_pass.formats` knows is its name there, another one its kind and fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from fuse_pass.numerics.formats import (
    BlockFormat,
    FixedFormat,
    FloatFormat,
    Format,
    Granularity,
    IntFormat,
    as_format,
    formats,
)
from fuse_pass.numerics.spec import SITES, QuantSpec, Site

_KINDS: dict[str, Callable[..., Format]] = {
    kind.__name__: kind for kind in (FloatFormat, IntFormat, FixedFormat, BlockFormat)
}


def spec_as_dict(spec: QuantSpec) -> dict[str, Any]:
    """The sites that are quantised, and the rounding."""
    sites = {name: getattr(spec, name) for name in SITES}
    return {"rounding": spec.rounding} | {name: _site(site) for name, site in sites.items() if site is not None}


def spec_from_dict(described: Mapping[str, Any]) -> QuantSpec:
    """The spec that `spec_as_dict` described.

    Raises:
        ValueError: a site, format or field that it does not write.
    """
    _require_keys("a QuantSpec", described, (*SITES, "rounding"))
    sites = {name: _read_site(value) for name, value in described.items() if name != "rounding"}
    return QuantSpec(**sites, rounding=described.get("rounding", "nearest"))


def _site(site: Site) -> dict[str, Any]:
    described = {"rounding": site.rounding, "clip_grad": site.clip_grad, "scale": site.scale}
    return {"format": _format(site.format), "granularity": asdict(site.granularity), **described}


def _read_site(described: Any) -> Site:
    _require_keys("a Site", described, ("format", "granularity", "rounding", "clip_grad", "scale"))
    options = dict(described)
    granularity = options.pop("granularity", {})
    _require_keys("a Granularity", granularity, ("kind", "axis", "size"))
    return Site(_read_format(options.pop("format", None)), granularity=Granularity(**granularity), **options)


def _format(fmt: Format) -> Any:
    if fmt.name in formats and formats[fmt.name] == fmt:
        return fmt.name
    values = {field.name: getattr(fmt, field.name) for field in fields(fmt)}  # type: ignore[arg-type]
    values = {name: _format(value) if isinstance(value, Format) else value for name, value in values.items()}
    return {"kind": type(fmt).__name__} | {name: value for name, value in values.items() if name != "_"}


def _read_format(described: Any) -> Format:
    if not isinstance(described, Mapping):
        return as_format(described)
    values = dict(described)
    kind = _KINDS.get(values.pop("kind", ""))
    if kind is None:
        raise ValueError(f"expected a format of kind {', '.join(_KINDS)}, got {described!r}")
    _require_keys(f"a {kind.__name__}", values, [field.name for field in fields(kind)])  # type: ignore[arg-type]
    parts = ("element", "scale")  # of blocks
    return kind(**{name: _read_format(value) if name in parts else value for name, value in values.items()})


def _require_keys(what: str, described: Any, known: Any) -> None:
    if not isinstance(described, Mapping):
        raise ValueError(f"expected {what} as a mapping, got {described!r}")
    for name in described:
        if name not in known:
            raise ValueError(f"unknown field {name!r} of {what}; valid are {', '.join(known)}")
