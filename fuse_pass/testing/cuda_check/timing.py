"""Time on a GPU: by CUDA events, contenders alternating, the second-level cache flushed before each call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
_WARM_UP = 3
_ROUNDS = 20
# Larger than the second-level cache of any GPU so far.
_FLUSHED_BYTES = 256 << 20


def milliseconds(contenders: Mapping[str, Call], device: torch.device, rounds: int = _ROUNDS) -> dict[str, float]:
    """The median time of a call of each; they take turns, so that a change of the clock hits all."""
    for call in contenders.values():
        for _ in range(_WARM_UP):
            call()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name].append(_once(call, device))
    return {name: statistics.median(times) for name, times in samples.items()}


def _once(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)  # type: ignore[no-any-return]


def peak_mebibytes(call: Call, device: torch.device) -> float | None:
    """The most memory that is allocated at once during a call; None on a device that does not count it."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def copy_bandwidth(device: torch.device, elements: int) -> float:
    """Bytes a second, read and written, of a copy of so many float32 numbers."""
    x = torch.empty(elements, device=device)
    y = torch.empty_like(x)
    took = milliseconds({"copy": lambda: y.copy_(x)}, device)["copy"]
    return 2 * x.nbytes / (took / 1e3)
