"""Every generated kernel, compiled to machine code of three architectures."""

from __future__ import annotations

from typing import Any

import pytest

GROUP = "kernels"
ORDINARY = ["dropout_norm", "dropout_norm fp32", "mlp", "swiglu", "e4m3", "e4m3 stochastic", "int8", "mxfp4"]
SLOW = ["dropout_norm rms", "dropout_norm sum", "bit_linear", "bert", "bert autocast", "gpt2", "llama"]
# Those whose quotients must have eager's bits.
EXACT = {"e4m3", "e4m3 stochastic", "int8", "mxfp4", "bit_linear"}
# Means of weights are summed in float64, where the order of the terms does not show.
IN_DOUBLE = {"bit_linear"}
# A block of 32 elements with a scale of its own is shared by the threads of a warp, an element each.
IN_BLOCKS = {"mxfp4"}
_LARGE = 1 << 16


def cases(names: list[str], *, slow: bool = False) -> list[Any]:
    marks = pytest.mark.slow if slow else ()
    return [pytest.param(name, marks=marks, id=name) for name in names]


every_case = pytest.mark.parametrize(
    "case",
    [
        *cases(ORDINARY),
        *cases(SLOW, slow=True),
        *cases([f"{name}: every configuration" for name in ORDINARY], slow=True),
    ],
)


@every_case
def test_nothing_is_spilled(case: str, result: Any) -> None:
    assert result
    assert [kernel for kernel in result if kernel["spilled"]] == []


@every_case
def test_memory_is_read_in_vectors(case: str, result: Any) -> None:
    """By one of the configurations that Inductor tries, where all are compiled; asynchronous copies are no loads."""
    name, _, every_configuration = case.partition(":")
    large = [kernel for kernel in result if kernel["elements"] >= _LARGE]
    assert large
    if name in IN_BLOCKS:
        return
    chosen = [kernel for kernel in large if every_configuration or kernel["along_rows"]]
    in_vectors = {(kernel["kernel"], kernel["architecture"]): False for kernel in chosen}
    for kernel in chosen:
        in_vectors[kernel["kernel"], kernel["architecture"]] |= bool(kernel["vector_loads"]) or not kernel["loads"]
    assert [kernel for kernel, is_vector in in_vectors.items() if not is_vector] == []


@every_case
def test_quotients_are_exact_where_bits_are_promised(case: str, result: Any) -> None:
    if case.partition(":")[0] in EXACT:
        assert [kernel for kernel in result if kernel["approximate_quotients"]] == []


@every_case
def test_nothing_is_computed_in_double_precision(case: str, result: Any) -> None:
    if case.partition(":")[0] not in IN_DOUBLE:
        assert [kernel for kernel in result if kernel["doubles"]] == []
