"""Which spellings of a pattern are found in graphs on the pretended device, and whether the CPU is asked anything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fuse_pass import FuseBackend
from fuse_pass.gemm import measured
from fuse_pass.inductor import compat
from fuse_pass.patterns import PATTERNS, Pattern
from fuse_pass.report import Report
from tests.cuda.support import device

AUTOCAST = {"": None, " autocast bf16": torch.bfloat16, " autocast fp16": torch.float16}
_OF_THE_CPU = ((measured, "table"), (compat, "has_fast_cpu_dtype"), (compat, "has_vector_loops"))


class _Found(Exception):  # noqa: N818 - no error
    """The graph has been rewritten: there is nothing to run it on."""


def check(name: str) -> dict[str, Any]:
    """For `PATTERN[ autocast DTYPE]`: what each spelling is counted as, and how often probes of the CPU are asked.

    `on_cpu` is what it is counted as on a CPU, under the autocast of the CPU.
    """
    pattern = next(pattern for pattern in PATTERNS if pattern.name == name.partition(" ")[0])
    region = AUTOCAST[name.removeprefix(pattern.name)]
    with contextlib.ExitStack() as stack:
        asked = {
            name: stack.enter_context(mock.patch.object(owner, name, wraps=getattr(owner, name)))
            for owner, name in _OF_THE_CPU
        }
        counts = _counts_of_all(pattern, "cuda", region)
    return {
        "counts": counts,
        "on_cpu": _counts_of_all(pattern, "cpu", region),
        "asked": {name: probe.call_count for name, probe in asked.items()},
    }


def _counts_of_all(pattern: Pattern, on: str, autocast: torch.dtype | None) -> dict[str, dict[str, int]]:
    inputs = pattern.corpus.example_inputs()
    return {
        spelling: _counts(function, inputs, on, autocast) for spelling, function in pattern.corpus.spellings.items()
    }


def _counts(
    function: Callable[..., Tensor], inputs: Mapping[str, Any], on: str, autocast: torch.dtype | None
) -> dict[str, int]:
    found: list[Report] = []

    def rewrite(gm: Any, example_inputs: Any) -> Any:
        found.append(FuseBackend(strict=True).rewrite(gm)[1])
        raise _Found

    torch._dynamo.reset()
    region = torch.autocast(on, autocast) if autocast else contextlib.nullcontext()
    with device.fake_mode():
        args = [_on_device(value, on) for value in inputs.values()]
        with region, contextlib.suppress(Exception):
            torch.compile(function, backend=rewrite, fullgraph=True)(*args)
    return dict(found[0].counts())


def _on_device(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return like.requires_grad_(value.requires_grad)
