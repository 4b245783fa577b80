"""What makes a compiled artefact ours: sources, versions, options and the GEMM table.

The implementations of custom ops are in no cache key of PyTorch (issue 144344), so without this an upgrade of fuse_pass
would be served the kernels of the version before.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuse_pass.inductor import gemm

PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def source_hash() -> str:
    """SHA-256 over the names and contents of every source file of the package."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_key(options: Mapping[str, Any]) -> bytes:
    """Changes whenever the same graph could be compiled to something else by us."""
    parts = {"sources": source_hash(), "gemm": gemm.table(), "options": {k: repr(v) for k, v in options.items()}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
