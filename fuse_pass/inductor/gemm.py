"""Which library multiplies matrices fastest here: a one-off timed probe, kept in a file per machine.

Measured on one AMD Zen 5 core (torch 2.13): float32 `addmm` (MKL) runs at 88-98 GF/s, oneDNN's linear on plain weights
at 180-217 GF/s in all three products of a Linear (forward, input gradient, weight gradient). On other machines the two
may be level, so it is measured and not assumed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from fuse_pass.inductor import compat
from fuse_pass.machine import cpu_name

ATEN, ONEDNN, VIA_FLOAT32 = "aten", "onednn", "via_float32"

# Below this many floating-point operations the longer call (about 12 us against 3 us) costs more than it gives.
MIN_FLOP = 1_000_000
# oneDNN must be this much faster to be chosen; a tie goes to aten, which Inductor knows how to fuse and tune.
MIN_GAIN = 1.05
_PROBE_SIZE = (256, 768, 768)
_PROBE_REPEATS = 7


def provider(device: torch.device, dtype: torch.dtype, flop: int | None, *, with_activation: bool = False) -> str:
    """Who computes a product of `flop` operations (None: unknown, taken as large): ATEN, ONEDNN or VIA_FLOAT32.

    `with_activation` asks for the product and an activation in one call. VIA_FLOAT32 is for float16 on a CPU without
    float16 arithmetic, where aten falls to a scalar loop.
    """
    if device.type != "cpu":
        return ATEN
    if dtype is torch.float16 and not compat.has_fast_cpu_dtype(dtype):
        return VIA_FLOAT32
    if flop is not None and flop < MIN_FLOP:
        return ATEN
    return table().get(_key(dtype, with_activation), ATEN)


@functools.cache
def table() -> dict[str, str]:
    """The probe's verdicts for this machine, torch version and thread count; from the cache file if there is one."""
    if compat.onednn_linear() is None:
        return {}
    path = _cache_file()
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):  # absent, unreadable, or not what we wrote
        return dict(json.loads(path.read_text())["providers"])
    measured = _probe()
    _write(path, {"machine": _machine(), "providers": measured})
    return measured


def _key(dtype: torch.dtype, with_activation: bool) -> str:
    return f"{str(dtype).removeprefix('torch.')}{'+activation' if with_activation else ''}"


def _probe() -> dict[str, str]:
    dtypes = [torch.float32] + [torch.bfloat16] * compat.has_fast_cpu_dtype(torch.bfloat16)
    verdicts = {}
    # The probe may be asked for in the middle of a trace: no fake tensors, no proxies, no autocast, no autograd.
    with compat.disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype in dtypes:
            for with_activation in (False, True):
                aten, onednn = _contenders(dtype, with_activation)
                gain = _median_ratio(aten, onednn)
                verdicts[_key(dtype, with_activation)] = ONEDNN if gain > MIN_GAIN else ATEN
    return verdicts


def _contenders(dtype: torch.dtype, with_activation: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """The three products of one Linear's training step (or its forward with GELU) by aten and by oneDNN."""
    rows, out_features, in_features = _PROBE_SIZE
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, in_features), (out_features, in_features), (rows, out_features))
    )
    linear = compat.onednn_linear()
    assert linear is not None
    if with_activation:
        return (
            lambda: torch.nn.functional.gelu(torch.mm(x, weight.t())),
            lambda: linear(x, weight, None, "gelu", [], "none"),
        )
    return (
        lambda: (torch.mm(x, weight.t()), torch.mm(grad, weight), torch.mm(grad.t(), x)),
        lambda: tuple(
            linear(a, b, None, "none", [], "") for a, b in ((x, weight), (grad, weight.t()), (grad.t(), x.t()))
        ),
    )


def _median_ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    slow(), fast()  # warm-up
    # The two alternate, so that a change of the machine's speed hits both.
    return statistics.median(seconds(slow) / seconds(fast) for _ in range(_PROBE_REPEATS))


def _machine() -> str:
    return f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _cache_file() -> Path:
    slug = "".join(c if c.isalnum() else "-" for c in _machine())
    return Path(cache_dir()) / "fuse_pass" / f"gemm-{slug}.json"


def _write(path: Path, content: object) -> None:
    """Atomic, so that a second process never reads half a file. A read-only cache costs the next process a probe."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
