"""Which einsum equations are a Linear: `...i,oi->...o` in any lettering, either operand first.

One index is summed, the last of x and one of the two of the weight; the weight's other index takes its place in the
result. The indices of the rows keep their order, so that nothing is moved in memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TERM = r"([a-zA-Z]*(?:\.\.\.)?[a-zA-Z]*)"
_EQUATION = re.compile(f"^{_TERM},{_TERM}->{_TERM}$")


@dataclass(frozen=True)
class LinearEquation:
    """Attributes:
    x: position of x among the two operands.
    transposed: True where the weight is stored `[in, out]`.
    """

    x: int
    transposed: bool


def linear_equation(equation: str) -> LinearEquation | None:
    """How an equation with an explicit result reads as a Linear; None where it is another product."""
    match = _EQUATION.match(equation.replace(" ", ""))
    if match is None:
        return None
    first, second, result = match.groups()
    for position, (x, weight) in enumerate(((first, second), (second, first))):
        transposed = _reads_as_linear(x, weight, result)
        if transposed is not None:
            return LinearEquation(position, transposed)
    return None


def _reads_as_linear(x: str, weight: str, result: str) -> bool | None:
    """Whether the weight is stored `[in, out]`; None where the equation is no Linear of x."""
    if len(weight) != 2 or "." in weight or not x or x[-1] not in weight or weight[0] == weight[1]:
        return None
    rows, summed = x[:-1], x[-1]
    kept = weight.replace(summed, "")
    letters = rows.replace(".", "")
    if len(set(letters)) != len(letters) or summed in letters or kept in letters or result != rows + kept:
        return None
    return weight[0] == summed
