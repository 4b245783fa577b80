"""Which equations are a Linear, proved by computing them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fuse_pass.graph.einsum import linear_equation

# equation → (position of x, transposed)
LINEARS = {
    "...i,oi->...o": (0, False),
    "...i,io->...o": (0, True),
    "oi,...i->...o": (1, False),
    "bti,oi->bto": (0, False),
    "btd, df -> btf": (0, True),
    "b...i,io->b...o": (0, True),
    "...tc,cd->...td": (0, True),
    "bi,oi->bo": (0, False),
    "oi,bi->bo": (1, False),
    "i,oi->o": (0, False),
    "bTX,ZX->bTZ": (0, False),
}
OTHERS = {
    "another index is summed": "bti,ot->bio",
    "rows are permuted": "bti,oi->tbo",
    "features do not come last": "bti,oi->bot",
    "features are not last in x": "bit,oi->bto",
    "rows are summed too": "bti,oi->bo",
    "nothing is summed": "bti,oi->btio",
    "the kept index is summed": "bti,oi->bt",
    "a weight per batch": "bti,boi->bto",
    "a diagonal of x": "bbi,oi->bo",
    "a diagonal of the weight": "bti,ii->bti",
    "an outer product": "bt,oi->btoi",
    "one operand": "bti->bit",
    "three operands": "bti,oi,po->btp",
    "no explicit result": "bti,oi",
    "dots in the weight": "bti,...i->bt...",
}


@pytest.mark.parametrize("equation", LINEARS)
def test_linear_equations(equation: str) -> None:
    found = linear_equation(equation)
    assert found is not None
    assert (found.x, found.transposed) == LINEARS[equation]
    term = equation.replace(" ", "").split("->")[0].split(",")[found.x]
    sizes = [size for _, size in zip(term.replace("...", "")[:-1], (3, 5), strict=False)]
    rows = sizes + [2] * ("..." in term)
    x, weight = torch.randn(*rows, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    stored = weight.t().contiguous() if found.transposed else weight
    operands = (x, stored) if found.x == 0 else (stored, x)
    torch.testing.assert_close(torch.einsum(equation, *operands), F.linear(x, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("equation", OTHERS.values(), ids=OTHERS)
def test_other_equations(equation: str) -> None:
    assert linear_equation(equation) is None
