"""What this machine is called, for figures and for tables that belong to one machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from pathlib import Path

import torch

# How the names of instruction sets begin that multiply or convert numbers, on x86 and on ARM.
_ARITHMETIC = ("avx", "amx", "fma", "f16c", "sse4", "asimd", "sve", "smef", "smei", "fphp", "bf16", "i8mm")


@functools.cache
def cpu_name() -> str:
    """The processor's own name, e.g. `AMD EPYC 9575F 64-Core Processor`, or its architecture if that is all we know."""
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


@functools.cache
def processor() -> str:
    """Name, family, model and arithmetic instructions of the processor, e.g. `AMD EPYC, 25, 1, avx avx2 f16c fma`.

    Hypervisors call many different processors by one name. This tells apart those on which code or a measurement of one
    may be wrong on the other.
    """
    info = _cpu_info()
    arithmetic = " ".join(sorted(name for name in instructions() if name.startswith(_ARITHMETIC)))
    models = [info[field] for field in ("cpu family", "model", "CPU implementer", "CPU part") if field in info]
    return ", ".join((cpu_name(), *models, arithmetic))


def instructions() -> frozenset[str]:
    """All that Linux says the processor can do, e.g. `avx2`; empty elsewhere."""
    info = _cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


@functools.cache
def may_use_tiles() -> bool:
    """Asks Linux for the tile registers of AMX, which a process may use from then on; x86-64 only."""
    request_permission, tile_data, arch_prctl = 0x1023, 18, 158
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def _cpu_info() -> dict[str, str]:
    """What Linux says about the first processor; empty elsewhere."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().strip().split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


def instruction_set() -> str:
    """The widest vector instructions that PyTorch uses here, e.g. `AVX512`."""
    return torch.backends.cpu.get_cpu_capability()
