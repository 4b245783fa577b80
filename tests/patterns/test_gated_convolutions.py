"""Gated blocks of 1×1 convolutions, separate and merged: fused where their layout allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.report import Reason
from tests.patterns.truth import assert_declines, assert_fused_like_eager

WIDTH = 24


def inputs(x: Tensor) -> dict[str, Any]:
    ones = (1,) * (x.dim() - 2)
    values = {
        "x": x,
        "gate": torch.randn(WIDTH, 8, *ones),
        "up": torch.randn(WIDTH, 8, *ones),
        "bias": torch.randn(2 * WIDTH),
        "down": torch.randn(16, WIDTH, *ones),
    }
    return {name: value.to(x.dtype).requires_grad_() for name, value in values.items()}


def separate(x: Tensor, gate: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
    """StarNet's block."""
    return F.conv2d(F.relu6(F.conv2d(x, gate, bias[:WIDTH])) * F.conv2d(x, up, bias[WIDTH:]), down)


def merged(halves: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    def block(x: Tensor, gate: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
        first, second = halves(F.conv2d(x, torch.cat([gate, up]), bias))
        return F.conv2d(F.gelu(first) * second, down)

    return block


def glu(x: Tensor, gate: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
    """The convolution module of a Conformer, without its depthwise part."""
    return F.conv1d(F.glu(F.conv1d(x, torch.cat([gate, up]), bias), dim=1), down)


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "separate": separate,
    "chunk": merged(lambda h: h.chunk(2, dim=1)),
    "split": merged(lambda h: h.split(WIDTH, 1)),
    "slices": merged(lambda h: (h[:, :WIDTH], h[:, WIDTH:])),
    "slices of every dimension": merged(lambda h: (h[:, :WIDTH, :, :], h[:, WIDTH:, :, :])),
    "narrow": merged(lambda h: (h.narrow(1, 0, WIDTH), h.narrow(1, WIDTH, WIDTH))),
    "dimension from the end": merged(lambda h: h.chunk(2, -3)),
    "slices before an ellipsis": merged(lambda h: (h[:, :WIDTH, ...], h[:, WIDTH:, ...])),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(function: Callable[..., Tensor], layout: torch.memory_format, dynamic: bool) -> None:
    x = torch.randn(3, 8, 5, 6).to(memory_format=layout)
    found = assert_fused_like_eager(function, inputs(x), counts={"gated_dense": 1}, dynamic=dynamic)
    assert found.report.declines == []
    assert "1×1 convolutions" in found.report.matches[0].variant
    assert found.output.stride() == function(*inputs(x).values()).stride()


def test_glu() -> None:
    assert_fused_like_eager(glu, inputs(torch.randn(3, 8, 40)), counts={"gated_dense": 1})
    with torch.no_grad():
        assert_fused_like_eager(glu, inputs(torch.randn(3, 8, 40)), counts={"gated_dense": 1})


def test_halves_of_another_dimension_are_no_gate_and_up() -> None:
    def pixels(x: Tensor, gate: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
        left, right = F.conv2d(x, gate, bias[:WIDTH]).chunk(2, -1)
        return F.conv2d(F.gelu(left) * right, down)

    found = assert_fused_like_eager(pixels, inputs(torch.randn(3, 8, 5, 6)), counts={})
    assert found.report.declines == []


def test_linear_and_convolution_in_one_block() -> None:
    """A gate by channels does not belong to features at the end, even if the sizes agree."""

    def mixed(x: Tensor, gate: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
        square = F.conv1d(x, gate.flatten(1).unsqueeze(-1))
        return F.linear(F.silu(square) * F.linear(x, up.flatten(1)), down.flatten(1))

    values = inputs(torch.randn(3, 8, 8))
    values["up"] = torch.randn(8, 8, 1, requires_grad=True)
    values["gate"] = torch.randn(8, 8, 1, requires_grad=True)
    values["down"] = torch.randn(5, 8, 1, requires_grad=True)
    assert_fused_like_eager(mixed, values, counts={})


def test_a_handful_of_pixels() -> None:
    assert_declines(separate, inputs(torch.randn(2, 8, 3, 3)), Reason.COST, "conv2d")


def test_a_layout_that_costs_more_in_half_precision() -> None:
    assert_declines(separate, inputs(torch.randn(3, 8, 5, 6, dtype=torch.bfloat16)), Reason.COST, "conv2d")


def test_groups() -> None:
    def grouped(x: Tensor, gate: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
        return F.conv2d(F.silu(F.conv2d(x, gate[:, :4], groups=2)) * F.conv2d(x, up), down)

    assert_declines(grouped, inputs(torch.randn(3, 8, 5, 6)), Reason.COST, "conv2d")
