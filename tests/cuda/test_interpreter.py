"""The generated kernels, run by Triton's interpreter: results and gradients against float64, bits where promised."""

from __future__ import annotations

from typing import Any

import pytest

GROUP = "interpret"
# Of float32, relative to the largest element: sums of some hundred products, and what a GELU adds.
TOLERANCE = 2e-6

COMPUTED = ["dropout_norm fp32", "dropout_norm rms fp32", "dropout_norm p=0 fp32", "mlp fp32", "swiglu fp32"]
LAYERS = ["bert fp32", "gpt2 fp32", "llama fp32"]
ROUNDED = ["e4m3 fp32", "e4m3 stochastic fp32", "int8 fp32", "mxfp4 fp32"]
slow = pytest.mark.slow


@pytest.mark.parametrize("case", [*COMPUTED, *(pytest.param(layer, marks=slow) for layer in LAYERS)])
def test_results_and_gradients_are_those_of_float64(case: str, result: Any) -> None:
    """With the same masks: an element dropped by one and kept by the other would be wrong by a tenth and more."""
    assert result["errors"]
    assert result["gradient_errors"]
    assert max(result["errors"] + result["gradient_errors"]) < TOLERANCE


@pytest.mark.parametrize("case", ["dropout_norm sum fp32"])
def test_masks_have_the_bits_of_the_cpu(case: str, result: Any) -> None:
    """The sum of what dropout kept and the residual, which both compute without rounding differently."""
    normalised, total = result["errors"]
    assert normalised < TOLERANCE
    assert total < TOLERANCE
    assert result["differing"][1] == 0
    assert max(result["gradient_errors"]) < TOLERANCE


@pytest.mark.parametrize("case", ROUNDED)
def test_fake_quantised_bits_are_those_of_the_cpu(case: str, result: Any) -> None:
    assert result["differing"] == [0]


@pytest.mark.parametrize("case", ["bit_linear fp32"])
def test_a_bit_linear_computes_what_the_cpu_does(case: str, result: Any) -> None:
    assert result["errors"][0] < TOLERANCE
    assert max(result["gradient_errors"]) < TOLERANCE
