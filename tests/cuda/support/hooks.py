"""Builds and loads `hooks.cpp`. Nothing here imports torch: the hooks come before it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("hooks.cpp")


def torch_folder() -> Path:
    """Where the package is, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def compiler() -> str | None:
    """The C++ compiler that Inductor would take, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(library: Path) -> None:
    """Compiles the hooks for this build of PyTorch.

    Raises:
        RuntimeError: with what the compiler says, where it fails.
    """
    folder = torch_folder()
    include, lib = folder / "include", folder / "lib"
    headers = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    linked = [f"-L{lib}", "-lc10", "-ltorch_cpu"]
    command = [str(compiler()), "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(library), *headers, *linked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load(library: Path) -> None:
    """Before the first `import torch` of a process."""
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library)).install_device_guard()
