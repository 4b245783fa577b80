"""Compiles our C++ once per machine, with the compiler that Inductor uses, and loads it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from fuse_pass.gemm.machine import instructions, may_use_tiles, processor
from fuse_pass.inductor import compat
from fuse_pass.inductor.cpp_compiler import cpp_compiler

_SOURCE = Path(__file__).with_name("few_bits.cpp")
_SOURCES = (_SOURCE, _SOURCE.with_name("amx.h"))
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
# For each LEVEL of the source: the instructions that it takes for granted.
_LEVELS = {
    3: ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "fma", "amx_tile", "amx_int8"),
    2: ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "fma"),
    1: ("avx2", "fma"),
    0: (),
}


def level() -> int:
    """Which LEVEL of the source this processor runs; no more than what PyTorch itself uses here."""
    capability = torch.backends.cpu.get_cpu_capability()
    allowed = 3 if capability == "AVX512" else 1 if capability == "AVX2" else 0
    found = next(level for level, needs in _LEVELS.items() if level <= allowed and instructions().issuperset(needs))
    return 2 if found == 3 and not may_use_tiles() else found


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, after a warning, where they cannot be compiled."""
    return load()


def load() -> ctypes.CDLL | None:
    """Compiles the kernels for `level()` if that was not done before, and loads them.

    A compiler that does not know the newest instructions compiles those of a lower level.
    """
    compiler = cpp_compiler()
    if compiler is None:
        _say_without("no C++ compiler was found (Inductor looks for one in the same way: set CXX)")
        return None
    problem = ""
    for one in range(level(), -1, -1):
        flags = [*_FLAGS, f"-DLEVEL={one}", *(_flag(name) for name in _LEVELS[one])]
        path = _path(compiler, flags)
        problem = "" if path.exists() else _problem_of_compiling(compiler, flags, path)
        if not problem:
            return _declared(ctypes.CDLL(str(path)))
    _say_without(problem)
    return None


def _problem_of_compiling(compiler: str, flags: list[str], path: Path) -> str:
    """Why it failed; empty where it did not."""
    try:
        _compile([compiler, *flags, str(_SOURCE)], path)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return f"{compiler} failed: {output.strip().splitlines()[-1] if output.strip() else error}"
    return ""


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of arguments, so that ctypes takes plain numbers."""
    address, number = ctypes.c_void_p, ctypes.c_long
    library.integer_product.argtypes = [address, number, number, address, number, address, number, number, number]
    grid = (address, address, address, number)
    library.float_product.argtypes = [address, number, number, address, number, *grid, address, number, number, number]
    return library


def _flag(instruction: str) -> str:
    """That with which g++ and clang use instructions that Linux calls so."""
    return f"-m{instruction.replace('_', '-' if instruction.startswith('amx') else '')}"


def _path(compiler: str, flags: list[str]) -> Path:
    """A name for these sources, compiled so, here: the folder may be shared by different machines."""
    version = _output(compiler, "-dumpfullversion")
    parts = (*(source.read_text() for source in _SOURCES), compiler, version, *flags, processor())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    return Path(compat.cache_dir()) / "fuse_pass" / f"few_bits-{digest}.so"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # said when it is to compile
        return ""


def _compile(command: list[str], path: Path) -> None:
    """Atomic: another process finds the whole library or none, and compiles its own meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        subprocess.run([*command, "-o", temporary], check=True, capture_output=True, text=True)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _say_without(why: str) -> None:
    warnings.warn(
        f"fuse_pass: packed weights are multiplied by plain PyTorch, which unpacks them in every call: {why}",
        RuntimeWarning,
        stacklevel=3,
    )
