"""What makes a compiled artefact ours: sources, versions, options, the GEMM table and the processor.

The implementations of custom ops are in no cache key of PyTorch (issue 144344), so without this an upgrade of fuse_pass
would be served the kernels of the version before.

Nor is the processor. Inductor writes the width of a vector into the source of a loop and keeps that source; on another
processor with the same cache folder (a home on a network, an image of a container) it is compiled for another width.
Measured with torch 2.13: a graph of AVX-512 that is found again under `ATEN_CPU_CAPABILITY=avx2` computes
`gelu(2 x) + x` for 64 numbers up to 6.3 with an error of 18.9, and says nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.fx import Graph

from fuse_pass.gemm import measured, onednn
from fuse_pass.gemm.machine import instruction_set, processor
from fuse_pass.inductor import compat
from fuse_pass.inductor.compiler import CustomGraphPass

PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def source_hash() -> str:
    """SHA-256 over the names and contents of every source file of the package."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_key(options: Mapping[str, Any], *, on_cpu: bool = True) -> bytes:
    """Changes whenever the same graph could be compiled to something else by us.

    Args:
        options: of `FuseBackend`.
        on_cpu: whether the graph may multiply on the CPU, so that it depends on what the probe finds there.
    """
    parts = {
        "sources": source_hash(),
        "gemm": measured.table() if on_cpu else None,
        "options": {k: repr(v) for k, v in options.items()},
        "processor": processor_key(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def require_key(key: bytes, on_cpu: bool) -> None:
    """Raises RuntimeError unless these sources, and what the probe has found, are those behind a `cache_key({}, …)`."""
    if key != cache_key({}, on_cpu=on_cpu):
        raise RuntimeError(
            "compiled by other sources of fuse_pass or on another machine; expected those of this process"
        )


def processor_key() -> tuple[str, ...]:
    """Changes whenever code that was compiled here could be wrong, or fail, where it is found again."""
    return processor(), instruction_set(), compat.vector_instructions(), onednn.abilities()


class OnThisProcessor(CustomGraphPass):
    """Inductor's `joint_custom_post_pass` for graphs with nothing of ours: keeps them apart by the processor.

    Args:
        inner: the user's own passes for the same slot.
    """

    def __init__(self, inner: Sequence[Callable[[Graph], None]] = ()) -> None:
        self._inner = tuple(inner)

    def __call__(self, graph: Graph) -> None:
        for run in self._inner:
            run(graph)

    def uuid(self) -> Any:
        inner = [run.uuid() if isinstance(run, CustomGraphPass) else None for run in self._inner]
        return None if None in inner else (processor_key(), *inner)  # Inductor takes None as "do not cache"
