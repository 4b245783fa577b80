"""Compiles the Triton kernels of a case to machine code, and says what is in it."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from torch._inductor import async_compile
from torch._inductor.codecache import PyCodeCache

from fuse_pass import FuseBackend
from tests.cuda.support.capture import capture
from tests.cuda.support.cases import CASES, LARGE

ARCHITECTURES = (80, 90, 120)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# What is looked for in PTX: loads of 8 or 16 bytes a thread, quotients that are not IEEE's, double precision.
_VECTOR_LOAD = re.compile(r"ld\.global[\w.:]*\.v[248]\.")
_APPROXIMATE_QUOTIENT = re.compile(r"\b(?:div\.full|div\.approx|rcp\.approx)\b")
_DOUBLE = re.compile(r"\b(?!mov|ld|st)\w+(?:\.\w+)*\.f64\b")


def check(name: str) -> list[dict[str, Any]]:
    """One row for each kernel, architecture and configuration; `NAME: all` has every configuration, else the first."""
    case, _, configurations = name.partition(": ")
    chosen = CASES[case]
    backend = FuseBackend(strict=True, **chosen.options)
    sources = capture(lambda: chosen.build(LARGE), backend, train=chosen.train, autocast=chosen.autocast)
    return [
        _facts(kernel, tuner, architecture, configuration)
        | {"along_rows": "reduction_hint" not in source or "ReductionHint.INNER" in source}
        for kernel, source in _kernels(sources.all).items()
        for architecture in ARCHITECTURES
        for tuner in [getattr(PyCodeCache.load(_for(source, architecture)), kernel)]
        for configuration in (tuner.configs if configurations else tuner.configs[:1])
    ]


def _kernels(wrappers: list[str]) -> dict[str, str]:
    """The sources by name."""
    found: dict[str, str] = {}

    class Compiler:
        def triton(self, name: str, source: str, device_str: str = "cuda") -> None:
            found[name] = source

        def wait(self, scope: Any) -> None:
            pass

    with mock.patch.object(async_compile, "AsyncCompile", Compiler):
        for wrapper in wrappers:
            exec(compile(wrapper, "captured.py", "exec"), {"__name__": "captured"})
    return found


def _for(source: str, architecture: int) -> str:
    """The source says for which device it is: the pretended one."""
    return re.sub(r"cc=\d+, major=\d+", f"cc={architecture}, major={architecture // 10}", source)


def _facts(name: str, tuner: Any, architecture: int, configuration: Any) -> dict[str, Any]:
    kernel = tuner._precompile_config(configuration).kernel
    registers, stack, _, local = _resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return {
        "kernel": name,
        "architecture": architecture,
        "configuration": str(configuration),
        "elements": math.prod(tuner.size_hints.values()),
        "registers": registers,
        "spilled": stack + local,
        "loads": len(re.findall(r"ld\.global", ptx)),
        "vector_loads": len(_VECTOR_LOAD.findall(ptx)),
        "approximate_quotients": len(_APPROXIMATE_QUOTIENT.findall(ptx)),
        "doubles": len(_DOUBLE.findall(ptx)),
    }


def _resources(cubin: bytes) -> tuple[int, ...]:
    """Registers, stack, shared and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        told = subprocess.run(tool, capture_output=True, text=True, check=True)
    found = _RESOURCES.search(told.stdout + told.stderr)
    assert found is not None, told.stdout + told.stderr
    return tuple(map(int, found.groups()))
