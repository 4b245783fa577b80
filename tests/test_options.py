"""The options of a compilation: one object, whoever gives them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import fuse_pass
from fuse_pass import FuseBackend, QuantSpec
from fuse_pass.numerics.spec import spec_of
from fuse_pass.options import PATTERN_NAMES, Options, names


def test_defaults() -> None:
    assert Options.of() == Options() == FuseBackend().options
    assert Options().as_dict() == {
        "patterns": PATTERN_NAMES, "quantize": None, "memory": "balanced", "prepack": False, "strict": False,
    }  # fmt: skip


@pytest.mark.parametrize("callee", [FuseBackend, fuse_pass.compile])
def test_who_takes_options_takes_all_of_them(callee: Any) -> None:
    parameters = inspect.signature(callee).parameters
    assert [name for name in parameters if name in names()] == list(names())
    for name in ("memory", "prepack", "strict"):
        assert parameters[name].default == getattr(Options(), name)


def test_names_may_come_in_any_order() -> None:
    assert Options.of(["dropout_norm", "gated_dense"]).patterns == ("gated_dense", "dropout_norm")
    assert Options.of([]).patterns == ()


def test_a_format_is_a_spec() -> None:
    assert Options.of(quantize="int8").quantize == spec_of("int8")


def test_update() -> None:
    options = Options.of(["dense"], "int8", memory="smallest")
    assert options.updated({}) == options
    assert options.updated({"quantize": None}).quantize is None
    assert options.updated({"patterns": None}).patterns == PATTERN_NAMES
    assert options.updated({"strict": True}).as_dict() == options.as_dict() | {"strict": True}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"memory": "little"}, ValueError, "unknown setting 'little' of memory; valid are fastest, balanced, smallest"),
        ({"prepack": 1}, TypeError, "prepack: expected a bool, got 1"),
        ({"strict": None}, TypeError, "strict: expected a bool, got None"),
        ({"patterns": "dense"}, TypeError, "got the string 'dense'"),
        ({"patterns": ["gelu"]}, ValueError, "unknown pattern 'gelu'"),
        ({"quantize": QuantSpec("int8", grad="int8")}, ValueError, "expected a QuantSpec with grad=None"),
        ({"fast": True}, TypeError, "fast"),
    ],
)
def test_errors(given: dict[str, Any], error: type[Exception], message: str) -> None:
    for make in (lambda: Options.of(**given), lambda: Options().updated(given)):
        with pytest.raises(error, match=message):
            make()
