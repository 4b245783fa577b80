"""A 1×1 convolution whose channels are the features of a Linear, as in heads that predict depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.report import Reason
from tests.capture import capture
from tests.patterns.truth import assert_declines, assert_fused_like_eager

N, H, W = 3, 5, 6
Move = Callable[[Tensor], Tensor]


def inputs(dtype: torch.dtype = torch.float32, rows: int = H * W) -> dict[str, Any]:
    shapes = {"x": (N, rows, 8), "w1": (24, 8), "b1": (24,), "w2": (16, 24, 1, 1), "b2": (16,)}
    return {name: torch.randn(*shape).to(dtype).requires_grad_() for name, shape in shapes.items()}


def image(h: Tensor) -> Tensor:
    """DPT: `[N, L, C]` → `[N, C, H, W]`."""
    return h.permute(0, 2, 1).reshape(h.shape[0], h.shape[2], H, W)


def head(move: Move) -> Callable[..., Tensor]:
    return lambda x, w1, b1, w2, b2: F.conv2d(move(F.gelu(F.linear(x, w1, b1))), w2, b2)


MOVES: dict[str, Move] = {
    "permute, reshape": image,
    "transpose, unflatten": lambda h: h.transpose(1, 2).unflatten(2, (H, W)),
    "transpose, contiguous, view": lambda h: h.transpose(-1, -2).contiguous().view(N, 24, H, W),
    "an image of rows": lambda h: h.view(N, H, W, -1).permute(0, 3, 1, 2),
    "permuted by keyword": lambda h: h.view(N, H, W, 24).permute(dims=(0, -1, 1, 2)).contiguous(),
}
SPELLINGS: dict[str, Callable[..., Tensor]] = {
    **{name: head(move) for name, move in MOVES.items()},
    "moved before the activation": lambda x, w1, b1, w2, b2: F.conv2d(F.relu(image(F.linear(x, w1, b1))), w2, b2),
    "inactive dropout": lambda x, w1, b1, w2, b2: F.conv2d(
        F.dropout(image(F.dropout(F.silu(F.linear(x, w1, b1)), 0.5, False)), 0.5, False), w2, b2
    ),
    "no biases": lambda x, w1, b1, w2, b2: F.conv2d(image(F.gelu(x @ w1.T)), w2),
    "one dimension": lambda x, w1, b1, w2, b2: F.conv1d(F.gelu(F.linear(x, w1, b1)).transpose(1, 2), w2[..., 0], b2),
}


@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(function: Callable[..., Tensor]) -> None:
    found = assert_fused_like_eager(function, inputs(), counts={"dense_act_dense": 1})
    assert found.report.declines == []
    assert "1×1 convolution behind a Linear" in found.report.matches[0].variant
    assert found.output.stride() == function(*inputs().values()).stride()
    with torch.no_grad():
        assert_fused_like_eager(function, inputs(), counts={"dense_act_dense": 1})


def test_half_precision_whose_layout_stays() -> None:
    found = assert_fused_like_eager(head(MOVES["an image of rows"]), inputs(torch.bfloat16))
    assert found.report.counts() == {"dense_act_dense": 1}, str(found.report)
    with torch.no_grad():
        assert_declines(head(MOVES["an image of rows"]), inputs(torch.bfloat16), Reason.COST, "conv2d")


def test_dropout_between() -> None:
    """Its mask is drawn for the rows, wherever eager drops."""

    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.conv2d(image(F.dropout(F.gelu(F.linear(x, w1, b1)), 0.25)), w2, b2)

    assert_fused_like_eager(function, inputs(), counts={"dense_act_dense": 1})


# --- near misses


def pixels_turned(h: Tensor) -> Tensor:
    return image(h).transpose(2, 3)


def rows_as_channels(h: Tensor) -> Tensor:
    """As many channels, but they are rows."""
    return h.reshape(N, 24, H, W)


def batch_moved(h: Tensor) -> Tensor:
    return h.permute(1, 2, 0).unsqueeze(-1)


def other_channels(h: Tensor) -> Tensor:
    return h.permute(0, 2, 1).reshape(N, 12, H, 2 * W).repeat(1, 2, 1, 1)


OTHERS: dict[str, Move] = {
    "pixels change places": pixels_turned,
    "rows become channels": rows_as_channels,
    "another batch": batch_moved,
    "channels are split": other_channels,
}


@pytest.mark.parametrize("move", OTHERS.values(), ids=OTHERS)
def test_other_moves_do_not_fuse(move: Move) -> None:
    assert_fused_like_eager(head(move), inputs(), counts={})


def test_rows_whose_features_are_split_before() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.gelu(F.linear(x, w1, b1)).reshape(N, 2 * H * W, 12).permute(0, 2, 1).reshape(N, 12, H, 2 * W)
        return F.conv2d(h, w2[:, :12], b2)

    assert_declines(function, inputs(), Reason.LAYOUT, "reshape")


def test_a_second_reader() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Any:
        h = image(F.gelu(F.linear(x, w1, b1)))
        return F.conv2d(h, w2, b2), h.sum()

    assert_declines(function, inputs(), Reason.SECOND_READER, "h")


def test_few_rows() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.conv2d(F.gelu(F.linear(x, w1, b1)).transpose(1, 2).unsqueeze(-1), w2, b2)

    assert_declines(function, inputs(rows=4), Reason.COST, "conv2d")


def test_a_grouped_convolution() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.conv2d(image(F.gelu(F.linear(x, w1, b1))), w2[:, :6], b2, groups=4)

    assert_declines(function, inputs(), Reason.COST, "conv2d")


def test_sizes_that_are_known_at_run_time_only() -> None:
    values = inputs()
    found = capture(head(lambda h: h.transpose(1, 2).unsqueeze(-1)), *values.values(), dynamic=True)
    assert [decline.reason for decline in found.report.declines] == [Reason.LAYOUT]
    torch.testing.assert_close(found.output, head(lambda h: h.transpose(1, 2).unsqueeze(-1))(*values.values()))
