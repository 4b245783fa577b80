"""Rows that change places between a dropout and its norm: the norm of every row goes before, where that is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.report import Reason
from tests.capture import capture
from tests.patterns.truth import assert_blames, assert_declines, assert_fused_like_eager

Moves = Callable[[Tensor], Tensor]


def inputs() -> dict[str, Any]:
    """Windows `[B · 2 · 3, 2 · 2, C]` of images `[B, 4, 6, C]`."""
    x, r = (torch.randn(12, 4, 10, requires_grad=True) for _ in range(2))
    return {"x": x, "r": r, "w": torch.randn(10, requires_grad=True), "b": torch.randn(10, requires_grad=True)}


def windows_put_back(z: Tensor) -> Tensor:
    return z.view(-1, 2, 3, 2, 2, 10).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, 6, 10)


MOVES: dict[str, Moves] = {
    "windows": windows_put_back,
    "windows, reshape": lambda z: z.reshape(2, 2, 3, 2, 2, 10).permute([0, 1, 3, 2, 4, 5]).reshape(-1, 24, 10),
    "windows, an image of full size": lambda z: windows_put_back(z)[:, :4, :6, :].contiguous(),
    "windows, rolled": lambda z: torch.roll(windows_put_back(z), shifts=(1, 2), dims=(1, 2)),
    "windows, rolled along one dimension": lambda z: windows_put_back(z).roll(1, 1),
    "sequence first": lambda z: z.transpose(0, 1).contiguous(),
    "swapped": lambda z: z.swapaxes(-3, -2).reshape(-1, 10),
    "permuted by keyword": lambda z: z.permute(dims=(1, 0, 2)).flatten(0, 1),
}
SPELLINGS: dict[str, Callable[[Moves], Callable[..., Any]]] = {
    "dropout": lambda move: lambda x, r, w, b: F.layer_norm(move(F.dropout(x, 0.25)), (10,), w, b),
    "sum": lambda move: lambda x, r, w, b: F.layer_norm(move(F.dropout(x, 0.25) + r), (10,), w, b),
    "sum read again": lambda move: lambda x, r, w, b: (
        lambda z: (F.layer_norm(move(z), (10,), w, b), torch.sin(z))
    )(r + F.dropout(x, 0.25)),
    "moved sum read again": lambda move: lambda x, r, w, b: (
        lambda z: (F.layer_norm(z, (10,), w, b), torch.sin(z))
    )(move(F.dropout(x, 0.25) + r)),
    "written out": lambda move: lambda x, r, w, b: (
        lambda z: w * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6))
    )(move(F.dropout(x, 0.25) + r)),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_the_norm_goes_before(move: Moves, spelling: Callable[[Moves], Any]) -> None:
    function = spelling(move)
    found = assert_fused_like_eager(function, inputs(), counts={"dropout_norm": 1})
    assert "dropout" in found.report.matches[0].variant
    expected, got = function(*inputs().values()), found.output
    pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]
    assert all(a.stride() == b.stride() for a, b in pairs)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize(
    "read",
    [lambda x, r: F.dropout(x, 0.25, False), lambda x, r: x + r, lambda x, r: F.dropout(x, 0.25, False) + r],
    ids=["inactive dropout", "sum", "both"],
)
def test_without_an_active_dropout_there_is_nothing_to_gain(read: Any, move: Moves) -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(move(read(x * 2, r)), (10,), w, b)

    (decline,) = assert_declines(function, inputs(), Reason.COST, "")
    assert "nothing to gain" in decline.detail


def assert_left_alone(function: Callable[..., Tensor], reason: Reason, node: str, **options: Any) -> None:
    """One decline; the dropout that stays draws eager's numbers."""
    values = inputs().values()
    torch.manual_seed(1)
    found = capture(function, *values, **options)
    assert found.report.matches == []
    assert_blames(found.report, reason, node)
    torch.manual_seed(1)
    torch.testing.assert_close(found.output, function(*values))


def put_back(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(windows_put_back(F.dropout(x, 0.25) + r), (10,), w, b)


def rolled(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm((F.dropout(x, 0.25) + r).roll(1, 1), (10,), w, b)


def test_any_number_of_images() -> None:
    values = inputs()
    for name in ("x", "r"):
        torch._dynamo.mark_dynamic(values[name], 0)
    found = capture(rolled, *values.values())
    assert found.report.counts() == {"dropout_norm": 1}
    assert found.output.shape == (12, 4, 10)


def test_sizes_that_are_known_at_run_time_only() -> None:
    assert_left_alone(put_back, Reason.LAYOUT, "permute", dynamic=True)


OTHERS: dict[str, tuple[Moves, Reason, str]] = {
    "an image that was padded": (lambda z: windows_put_back(z)[:, :3, :6], Reason.COST, "getitem"),
    "the first row": (lambda z: z[:, :1], Reason.COST, "getitem"),
    "one row": (lambda z: z[:, 0], Reason.COST, "getitem"),
    "every other row": (lambda z: z[:, ::2], Reason.COST, "getitem"),
    "chosen rows": (lambda z: z[torch.tensor([3, 1])], Reason.COST, "getitem"),
    "rolled features": (lambda z: z.roll(1, -1), Reason.LAYOUT, "roll"),
    "rolled as one": (lambda z: z.roll(1), Reason.LAYOUT, "roll"),
}


@pytest.mark.parametrize(("move", "reason", "node"), OTHERS.values(), ids=OTHERS)
def test_other_moves_do_not_fuse(move: Moves, reason: Reason, node: str) -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(move(F.dropout(x, 0.25) + r), (10,), w, b)

    assert_left_alone(function, reason, node)


def test_half_of_the_features_is_no_row() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm((F.dropout(x, 0.25) + r)[..., :5], (5,), w[:5], b[:5])

    assert_left_alone(function, Reason.LAYOUT, "getitem")


def test_features_and_rows_that_change_places() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(F.dropout(x.repeat(1, 5, 1)[:, :10], 0.25).transpose(1, 2), (10,), w, b)

    assert_left_alone(function, Reason.COST, "transpose")


def test_two_normalised_dimensions_may_be_among_the_moved() -> None:
    """Both are 10 long: sizes alone would not tell."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = F.dropout(x.repeat(1, 5, 1)[:, :10] * 1, 0.25).reshape(3, 4, 10, 10).transpose(1, 2).reshape(12, 10, 10)
        return F.layer_norm(z, (10, 10))

    assert_left_alone(function, Reason.LAYOUT, "transpose")


def test_a_transposed_sum() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = F.dropout(x.transpose(0, 1), 0.25) + r.transpose(0, 1)
        return F.layer_norm(z.transpose(0, 1), (10,), w, b)

    assert_left_alone(function, Reason.LAYOUT, "transpose")


def test_values_that_are_cut_off_have_no_gradient_even_if_they_are_nan() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm((F.dropout(x, 0.25) + r * 0)[:6], (10,), w, b)

    values = inputs()
    with torch.no_grad():
        values["r"][6:] = torch.inf
    found = capture(function, *values.values())
    found.output.sum().backward()
    assert torch.isfinite(values["w"].grad).all()
