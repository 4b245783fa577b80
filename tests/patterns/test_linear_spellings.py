"""Ways to write one Linear layer, each between a plain one and an activation, and products that are no Linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.truth import assert_fused_like_eager

# f(x, weight [out, in]) → x Wᵀ
LINEARS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transpose": lambda x, w: x @ w.transpose(-1, -2),
    "swapaxes": lambda x, w: torch.matmul(x, w.swapaxes(0, 1)),
    "stored [in, out]": lambda x, w: x @ w.t().contiguous(),
    "scaled weight": lambda x, w: F.linear(x, w * 0.5 + 1),
    "standardised weight": lambda x, w: F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)),
    "sliced weight": lambda x, w: F.linear(x, torch.cat([w, w])[3 : 3 + w.shape[0]]),
    "sliced columns": lambda x, w: F.linear(x, torch.cat([w, w], 1)[:, 2 : 2 + w.shape[1]]),
    "chunk of a merged weight": lambda x, w: F.linear(x, torch.cat([w, w + 1]).chunk(2)[1]),
    "split of a merged weight": lambda x, w: F.linear(x, torch.cat([w, w - 1]).split(w.shape[0])[0]),
    "narrowed weight": lambda x, w: F.linear(x, torch.cat([w, w]).narrow(0, 1, w.shape[0])),
    "unbound weight": lambda x, w: F.linear(x, torch.stack([w, -w]).unbind(0)[1]),
    "indexed weight": lambda x, w: F.linear(x, torch.stack([w, -w])[0]),
    "squeezed weight": lambda x, w: F.linear(x, w.unsqueeze(-1).squeeze(-1)),
    "expanded weight": lambda x, w: F.linear(x, w[:1].expand(w.shape)),
    "addmm": lambda x, w: torch.addmm(w[:, 0], x.flatten(0, -2), w.t()).view(*x.shape[:-1], -1),
    "einsum": lambda x, w: torch.einsum("...x,yx->...y", x, w),
    "einsum, weight first": lambda x, w: torch.einsum("yx,...x->...y", w, x),
    "einsum with a list": lambda x, w: torch.einsum("bsd,df->bsf", [x, w.t()]),
    "einsum and a bias": lambda x, w: torch.einsum("bsd,df->bsf", x, w.T) + w[:, 0],
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bmm": lambda x, w: torch.bmm(x, w.t().expand(x.shape[0], -1, -1)),
    "baddbmm": lambda x, w: torch.baddbmm(w[:, 0], x, w.t().expand(x.shape[0], -1, -1)),
    "matmul of a batch of weights": lambda x, w: x @ w.t().expand(x.shape[0], -1, -1),
    "einsum of a batch of weights": lambda x, w: torch.einsum("bti,boi->bto", x, w.expand(x.shape[0], -1, -1)),
    "einsum over the rows": lambda x, w: torch.einsum("bti,ot->bio", x, w[:, : x.shape[1]]),
    "einsum that moves the features": lambda x, w: torch.einsum("bti,oi->bot", x, w).transpose(1, 2),
    "einsum that permutes the rows": lambda x, w: torch.einsum("bti,oi->tbo", x, w),
    "einsum that stretches x": lambda x, w: torch.einsum("...i,oi->...o", x[..., :1], w),
    "einsum of one element": lambda x, w: torch.einsum("bti,oi->bto", x[..., :1], w[:, :1]),
    "einsum of three": lambda x, w: torch.einsum("bti,oi,o->bto", x, w, w[:, 0]),
    "einsum by numbers": lambda x, w: torch.einsum(x, [0, 1, 2], w, [3, 2], [0, 1, 3]),
    "weight on the left": lambda x, w: (w @ x.transpose(1, 2)).transpose(1, 2),
}


def inputs() -> dict[str, Any]:
    shapes = {"x": (3, 5, 8), "w1": (12, 8), "w2": (7, 12)}
    return {name: torch.randn(*shape).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.parametrize("linear", LINEARS.values(), ids=LINEARS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_linear_before_and_after(linear: Callable[[Tensor, Tensor], Tensor], dynamic: bool) -> None:
    def both(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return linear(F.gelu(linear(x, w1)), w2)

    found = assert_fused_like_eager(both, inputs(), counts={"dense_act_dense": 1}, dynamic=dynamic)
    assert found.report.declines == []


@pytest.mark.parametrize("product", OTHERS.values(), ids=OTHERS)
def test_products_that_are_no_linear(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    def alone(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return F.gelu(product(x, w1)) @ w2.T

    found = assert_fused_like_eager(alone, inputs(), counts={})
    assert found.rewritten[0] is found.originals[0]


def test_an_einsum_of_one_element_is_a_multiplication_to_autocast() -> None:
    def function(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.einsum("bto,io->bti", F.gelu(F.linear(x, w1[:1])), w2[:, :1])

    found = assert_fused_like_eager(function, inputs(), counts={})
    assert found.output.dtype is torch.float32
