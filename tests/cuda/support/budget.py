"""Launches, bytes and what is kept for backward: ours and those of stock Inductor."""

from __future__ import annotations

from typing import Any
from unittest import mock

from fuse_pass import FuseBackend
from fuse_pass.gemm import measured
from tests.cuda.support.capture import capture
from tests.cuda.support.cases import CASES, LARGE, Case
from tests.cuda.support.traffic import Traffic, traffic_of


def check(name: str) -> dict[str, Any]:
    """For "ours", and where there is one, for "stock"."""
    case = CASES[name]
    found = {"ours": _measured(case, FuseBackend(strict=True, **case.options))}
    if case.has_rival:
        found["stock"] = _measured(case, "inductor")
    return found


def _measured(case: Case, backend: Any) -> dict[str, Any]:
    with mock.patch.object(measured, "table", wraps=measured.table) as probe:
        sources = capture(lambda: case.build(LARGE), backend, train=case.train, autocast=case.autocast)
    forward = sum(map(traffic_of, sources.forward), Traffic())
    backward = sum(map(traffic_of, sources.backward), Traffic())
    both = forward + backward
    return {
        "launches": len(both.launches),
        "bytes": both.bytes,
        "kept": backward.arguments,
        "arguments": both.arguments,
        "products": sorted({launch.dtype for launch in both.launches if launch.operations}),
        "cpu_probes": probe.call_count,
        "kernels": [(launch.kernel, launch.bytes) for launch in both.launches],
    }
