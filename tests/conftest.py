"""Every test starts from the same random state, without compiled code and before any product has failed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fuse_pass.gemm import onednn
from fuse_pass.gemm.machine import cpu_name, instruction_set
from fuse_pass.joint.cache_key import source_hash

# Stock Inductor does not know which sources an op of ours had when its cache was filled.
torch.compiler.config.cache_key_tag = source_hash()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which kind of processor these results are of."""
    terminalreporter.write_line(f"{cpu_name()}, {instruction_set()}, {onednn.abilities()}")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    onednn._failed.clear()
    yield
    torch._dynamo.reset()
