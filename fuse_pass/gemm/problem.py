"""A matrix product that somebody has to compute, as far as it is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse_pass.inductor import compat
from fuse_pass.numerics.activations import ACTIVATIONS, Activation
from fuse_pass.numerics.tensors import is_column_major

Size = int | torch.SymInt | None


@dataclass(frozen=True)
class GemmProblem:
    """`a [rows, inner] @ b [columns, inner].T (+ bias [columns])`, then an activation or none.

    Attributes:
        device: of the operands.
        dtype: of the operands, and of the result; int8 operands have an int32 result.
        sizes: rows, columns and inner; None where one is unknown.
        column_major: b is stored `[inner, columns]`.
        is_dense: b is stored by rows or by columns, and not expanded or strided otherwise.
        both_transposed: a is stored `[inner, rows]` and b `[inner, columns]`, as in the gradient of a weight.
        activation: name in `ACTIVATIONS` of what follows; empty for none.
        is_constant: b is a weight that stays as it is from call to call.
        in_graph: the product is written into a graph that Inductor compiles, and not run.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: tuple[Size, Size, Size] = (None, None, None)
    column_major: bool = False
    is_dense: bool = True
    both_transposed: bool = False
    activation: str = ""
    is_constant: bool = False
    in_graph: bool = True

    @classmethod
    def of(
        cls, a: Tensor, b: Tensor, *, activation: str = "", both_transposed: bool = False, is_constant: bool = False
    ) -> GemmProblem:
        """That of two operands at hand, now."""
        column_major, stride = is_column_major(b), b.stride(1)
        return cls(
            a.device,
            a.dtype,
            (a.shape[0], b.shape[0], a.shape[1]),
            column_major=column_major,
            is_dense=column_major or (isinstance(stride, int) and stride == 1),
            both_transposed=both_transposed,
            activation=activation,
            is_constant=is_constant,
            in_graph=compat.is_compiling(),
        )

    @property
    def hints(self) -> tuple[int | None, int | None, int | None]:
        """Rows, columns and inner size as numbers: of a symbol the one it was traced with."""
        rows, columns, inner = (None if size is None else compat.size_hint(size) for size in self.sizes)
        return rows, columns, inner

    @property
    def flop(self) -> int | None:
        """How many operations; None where a size is unknown, which is taken as many."""
        known = [size for size in self.hints if size is not None]
        return 2 * math.prod(known) if len(known) == len(self.hints) else None

    @property
    def fused_activation(self) -> tuple[str, str] | None:
        """What oneDNN calls the activation; None where it has none of this name."""
        return ACTIVATIONS[self.activation].post_op if self.activation else None


@dataclass(frozen=True)
class Epilogue:
    """What follows a product.

    Attributes:
        row: the activation.
        arguments: its numbers.
        weight: its parameter, if it has one.
    """

    row: Activation
    arguments: Sequence[float] = ()
    weight: Tensor | None = None

    def __call__(self, h: Tensor) -> Tensor:
        return self.row.forward(h, tuple(self.arguments), self.weight)
