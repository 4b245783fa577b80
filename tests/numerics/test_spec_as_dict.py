"""A spec goes to a file and comes back the same, name for name; what is no spec is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fuse_pass import BlockFormat, FixedFormat, FloatFormat, Granularity, IntFormat, QuantSpec, Site, formats
from fuse_pass.numerics.spec_as_dict import spec_as_dict, spec_from_dict

SPECS = {
    **{name: QuantSpec.uniform(name) for name in formats},
    "nothing": QuantSpec(),
    "rounding": QuantSpec.uniform("fp16", rounding="toward_zero"),
    "own float": QuantSpec(weight=FloatFormat(3, 4, bias=2, subnormal=False, encoding="finite", name="mine")),
    "own integer": QuantSpec(weight=IntFormat(5, name="five")),
    "own block": QuantSpec(input=BlockFormat(FloatFormat(2, 2, encoding="finite"), 8), weight=FixedFormat(2, 3)),
    "a known name for another format": QuantSpec(weight=FloatFormat(4, 3, name="fp8_e4m3")),
    "every field": QuantSpec(
        input=Site("int8_asymmetric", scale="static", clip_grad=True),
        weight=Site("int4", granularity=Granularity("group", size=32), rounding="nearest_away"),
        bias=Site("fp8_e4m3", scale="dynamic", granularity=Granularity("channel", axis=0)),
        grad="fp8_e5m2",
        rounding="toward_zero",
    ),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_comes_back_from_json(spec: QuantSpec) -> None:
    described = json.loads(json.dumps(spec_as_dict(spec)))
    assert spec_from_dict(described) == spec
    assert repr(spec_from_dict(described)) == repr(spec)  # formats compare without their names


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "site": ({"inputs": {"format": "int8"}}, "unknown field 'inputs' of a QuantSpec; valid are input"),
    "field": ({"input": {"format": "int8", "bits": 3}}, "unknown field 'bits' of a Site; valid are format"),
    "no site": ({"input": "int8"}, "expected a Site as a mapping, got 'int8'"),
    "format": ({"input": {"format": "int99"}}, "unknown format 'int99'"),
    "kind": ({"input": {"format": {"kind": "PositFormat"}}}, "expected a format of kind FloatFormat"),
    "field of a format": ({"input": {"format": {"kind": "IntFormat", "width": 3}}}, "unknown field 'width' of a IntF"),
    "field of a granularity": (
        {"input": {"format": "int8", "granularity": {"kind": "tensor", "block": 3}}},
        "unknown field 'block' of a Granularity",
    ),
}


@pytest.mark.parametrize(("described", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_spec_is_refused(described: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_from_dict(described)
