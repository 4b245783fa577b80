"""What belongs to a pattern beside its search: the formula, and the ways in which models write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Corpus:
    """For tests, and for the fuzzer, which plants spellings in programs.

    Attributes:
        reference: the mathematics of a pattern in eager PyTorch.
        spellings: functions with the arguments of `reference` that must all be found.
        example_inputs: arguments for `reference`; no two sizes are equal.
    """

    reference: Callable[..., Any]
    spellings: Mapping[str, Callable[..., Any]]
    example_inputs: Callable[..., dict[str, Any]]
