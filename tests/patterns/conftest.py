"""Which Linear layers are worth replacing is no question of the machine here."""

from __future__ import annotations

import pytest

from fuse_pass.patterns import dense


@pytest.fixture(autouse=True)
def every_linear_pays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one, where the pattern `dense` itself is asked; none, where the question is about another pattern."""
    callspec = getattr(request.node, "callspec", None)
    is_asked = callspec is not None and callspec.params.get("pattern") == dense.PATTERN.name
    monkeypatch.setattr(dense, "pays", lambda problem: is_asked)
