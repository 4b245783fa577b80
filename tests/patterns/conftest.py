"""Which Linear layers are worth replacing is no question of the machine here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuse_pass.patterns import dense
from tests.capture import costs, everything_pays, nothing_pays


@pytest.fixture(autouse=True)
def costs_of_no_machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every one, where the pattern `dense` itself is asked; none, where the question is about another pattern."""
    callspec = getattr(request.node, "callspec", None)
    is_asked = callspec is not None and callspec.params.get("pattern") == dense.PATTERN.name
    with costs(everything_pays if is_asked else nothing_pays):
        yield
