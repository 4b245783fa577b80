"""Mixtures of experts: feed-forward blocks whose every expert has weights of its own, recognised and left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.report import Reason
from tests.capture import Captured, capture

COUNT, ROWS = 3, 7


class Experts(nn.Module):
    """x `[experts, rows, 8]`; gate and up `[experts, 8, 24]`, merged `[experts, 8, 48]`, down `[experts, 24, 16]`."""

    def __init__(self, block: Callable[[Experts, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(COUNT, 8, 24)) for _ in range(2))
        self.merged = nn.Parameter(torch.randn(COUNT, 8, 48))
        self.down = nn.Parameter(torch.randn(COUNT, 24, 16))
        self.stored_out_in = nn.Parameter(torch.randn(COUNT, 16, 24))
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self, x)


def gated(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def grouped(experts: Experts, x: Tensor) -> Tensor:
    offsets = torch.arange(ROWS, ROWS * COUNT + 1, ROWS, dtype=torch.int32)
    hidden = torch._grouped_mm(x.flatten(0, 1).bfloat16(), experts.merged.bfloat16(), offs=offsets)
    return torch._grouped_mm(gated(hidden), experts.down.bfloat16(), offs=offsets).float()


GATED: dict[str, Callable[[Experts, Tensor], Tensor]] = {
    "grouped": grouped,
    "bmm": lambda e, x: torch.bmm(gated(torch.bmm(x, e.merged)), e.down),
    "matmul": lambda e, x: gated(x @ e.merged) @ e.down,
    "weights stored [out, in]": lambda e, x: gated(x @ e.merged) @ e.stored_out_in.transpose(1, 2),
    "separate": lambda e, x: (F.silu(x @ e.gate) * (x @ e.up)) @ e.down,
    "glu": lambda e, x: F.glu(x @ e.merged) @ e.down,
    "shared, weighted by a router": lambda e, x: torch.bmm(
        F.silu(torch.bmm(x, e.gate)) * torch.bmm(x, e.up) * x.mean(-1, keepdim=True), e.stored_out_in.transpose(1, 2)
    ),
    "weights of a router first": lambda e, x: (x.sum(-1, True) * (F.silu(x @ e.gate) * (x @ e.up))) @ e.down,
}
PLAIN: dict[str, Callable[[Experts, Tensor], Tensor]] = {
    "gelu": lambda e, x: F.gelu(x @ e.up) @ e.down,
    "squared relu": lambda e, x: x.bmm(e.up).relu().square().bmm(e.down),
}
OTHERS: dict[str, Callable[[Experts, Tensor], Tensor]] = {
    "attention": lambda e, x: torch.tanh(x @ x.mT) @ x,
    "a stack that is no parameter": lambda e, x: F.gelu(x @ e.up.softmax(-1)) @ e.down,
    "a weighted value that is no product": lambda e, x: (torch.sin(x @ e.up) * x.mean(-1, keepdim=True)) @ e.down,
    "one activation without a second product": lambda e, x: F.gelu(x @ e.up),
}


def through_the_pass(block: Callable[[Experts, Tensor], Tensor]) -> Captured:
    experts, x = Experts(block), torch.randn(COUNT, ROWS, 8)
    found = capture(experts, x)
    torch.testing.assert_close(found.output, experts(x))
    assert found.report.matches == []
    return found


@pytest.mark.parametrize(
    ("pattern", "block"),
    [*(("gated_dense", block) for block in GATED.values()), *(("dense_act_dense", block) for block in PLAIN.values())],
    ids=[*GATED, *PLAIN],
)
def test_recognised_and_not_worth_it(pattern: str, block: Callable[[Experts, Tensor], Tensor]) -> None:
    (decline,) = through_the_pass(block).report.declines
    assert (decline.pattern, decline.reason) == (pattern, Reason.COST)
    assert "for every expert" in decline.detail


@pytest.mark.parametrize("block", OTHERS.values(), ids=OTHERS)
def test_other_products_are_no_experts(block: Callable[[Experts, Tensor], Tensor]) -> None:
    assert through_the_pass(block).report.declines == []
