"""What this machine is called, for figures and for tables that belong to one machine."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path

import torch


@functools.cache
def cpu_name() -> str:
    """The processor's own name, e.g. `AMD EPYC 9575F 64-Core Processor`, or its architecture if that is all we know."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """The widest vector instructions that PyTorch uses here, e.g. `AVX512`."""
    return torch.backends.cpu.get_cpu_capability()
