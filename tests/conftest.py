"""Every test starts from the same random state and without compiled code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fuse_pass.inductor import compat, onednn
from fuse_pass.machine import cpu_name, instruction_set


def pytest_report_header() -> str:
    """Which kind of processor these results are of: `make test-other-cpu` makes a rich one answer as a poor one."""
    offers = (cpu_name(), instruction_set(), f"Inductor {compat.vector_instructions()}", onednn.abilities())
    return f"processor: {', '.join(offers)}"


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
