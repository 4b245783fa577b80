"""Every spelling on CUDA tensors is found as on a CPU, with and without autocast, and nobody asks what the CPU can."""

from __future__ import annotations

from typing import Any

import pytest

from fuse_pass.patterns import PATTERNS

GROUP = "match"
# A Linear alone is taken where a library of the CPU is faster than PyTorch's choice; on CUDA there is no other.
OF_THE_CPU_ALONE = {"dense"}
REGIONS = ["", " autocast bf16", " autocast fp16"]


def cases() -> list[Any]:
    slow = {" autocast fp16": (pytest.mark.slow,)}
    names = [(pattern.name + region, slow.get(region, ())) for pattern in PATTERNS for region in REGIONS]
    return [pytest.param(name, marks=marks, id=name) for name, marks in names]


@pytest.mark.parametrize("case", cases())
def test_every_spelling_is_found_as_on_a_cpu_which_nobody_asks(case: str, result: Any) -> None:
    """Autocast widens some spellings again, which decline on both: `x @ w + b` with a bias in float32."""
    name, _, region = case.partition(" ")
    assert result["counts"]
    if name in OF_THE_CPU_ALONE:
        assert not any(result["counts"].values())
    elif region:
        assert result["counts"] == result["on_cpu"]
    else:
        assert all(counts == {name: 1} for counts in result["counts"].values()), result["counts"]
    assert result["asked"] == {"table": 0, "has_fast_cpu_dtype": 0, "has_vector_loops": 0}
