"""Every spelling on CUDA tensors is found as on a CPU, with and without autocast, and nobody asks what the CPU can."""

from __future__ import annotations

from typing import Any

import pytest

from fuse_pass.patterns import PATTERNS

GROUP = "match"
# A Linear alone is taken where a library of the CPU is faster than PyTorch's choice; on CUDA there is no other.
OF_THE_CPU_ALONE = {"dense"}
REGIONS = ["", " autocast bf16", " autocast fp16"]


@pytest.mark.parametrize("case", [pattern.name + region for pattern in PATTERNS for region in REGIONS])
def test_every_spelling_is_found_and_no_cpu_is_asked(case: str, result: Any) -> None:
    name = case.partition(" ")[0]
    expected = {} if name in OF_THE_CPU_ALONE else {name: 1}
    assert result["counts"]
    assert {spelling: counts for spelling, counts in result["counts"].items() if counts != expected} == {}
    assert result["asked"] == {"table": 0, "has_fast_cpu_dtype": 0, "has_vector_loops": 0}
