"""Where oneDNN multiplies faster than PyTorch's own product here: a one-off timed probe, kept in a file per machine.

Measured on one AMD Zen 5 core (torch 2.13): float32 `addmm` (MKL) runs at 88-98 GF/s, oneDNN's linear on plain weights
at 180-217 GF/s in all three products of a Linear (forward, input gradient, weight gradient). On other machines the two
may be level, so it is measured and not assumed. Measured too is the size from which the longer call pays (14 us against
1.5 us there, so from about 3 MFLOP).

With an activation in the same call the two differ even where they multiply equally fast: in bfloat16 (256 x 768 x 1536)
oneDNN's GELU adds 9 % to the product, the kernel that Inductor makes for a GELU of its own 26 %.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fuse_pass.gemm import onednn
from fuse_pass.gemm.machine import instruction_set, processor
from fuse_pass.inductor import compat

# A product has at least as many operations where oneDNN is chosen, however small the measured break-even is.
MIN_FLOP = 1_000_000
# oneDNN must be this much faster to be chosen; a tie goes to aten, which Inductor knows how to fuse and tune.
MIN_GAIN = 1.1
# With an activation in the same call a pass over memory is saved too, so that a smaller gain is one.
MIN_GAIN_WITH_ACTIVATION = 1.02
# Chosen from this many times the break-even on: at it nothing is gained, and our op adds a third to the call.
_MARGIN = 4
_LARGE, _SMALL = (256, 768, 768), (1, 16, 16)
# Fewer summed columns, so that the activation is more of the whole than noise.
_LARGE_WITH_ACTIVATION = (256, 768, 384)
_REPEATS = 15
# Another number where the probe asks something else, so that verdicts of before are not found.
_VERSION = 3


@functools.cache
def table() -> dict[str, int]:
    """From how many operations on oneDNN is faster, per dtype; without an entry it never is.

    For this machine, torch version and thread count; from the cache file if there is one.
    """
    if compat.onednn_linear() is None:
        return {}
    machine, path = _machine(), _cache_file()  # as the next process finds them: the probe may see a product fail
    found = _read(path, machine)
    if found is None:
        found = _probe()
        _write(path, {"machine": machine, "break_even_flop": found})
    return found


def _read(path: Path, machine: str) -> dict[str, int] | None:
    """The table in a file that this machine has written; None for any other file, which is as good as none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):  # absent, unreadable, no JSON, or nested too deeply for the parser
        return None
    if not isinstance(content, dict) or content.get("machine") != machine:
        return None
    found = content.get("break_even_flop")
    is_ours = isinstance(found, dict) and all(_is_entry(name, flop) for name, flop in found.items())
    return found if is_ours else None


def _is_entry(name: str, flop: object) -> bool:
    """Whether a name is one that `key` makes and a number one that `_break_even` returns: a bool, too, is an int."""
    return name in _KEYS and type(flop) is int and flop >= MIN_FLOP


def key(dtype: torch.dtype, *, with_activation: bool = False) -> str:
    """The name of a verdict in `table`."""
    return f"{str(dtype).removeprefix('torch.')}{'+activation' if with_activation else ''}"


_PROBED = (torch.float32, torch.bfloat16)
_KEYS = tuple(key(dtype, with_activation=with_activation) for dtype in _PROBED for with_activation in (False, True))


def _probe() -> dict[str, int]:
    found: dict[str, int] = {}
    # The probe may be asked for in the middle of a trace: no fake tensors, no proxies, no autocast, no autograd.
    with compat.disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype in _PROBED:
            with contextlib.suppress(onednn.NoPrimitiveError), onednn.asked_for(dtype):
                found |= _probe_dtype(dtype)
    return found


def _probe_dtype(dtype: torch.dtype) -> dict[str, int]:
    found = {}
    for with_activation in (False, True):
        sizes, min_gain = (_LARGE_WITH_ACTIVATION, MIN_GAIN_WITH_ACTIVATION) if with_activation else (_LARGE, MIN_GAIN)
        large = _seconds_per_product(*_contenders(sizes, dtype, with_activation))
        small = _seconds_per_product(*_contenders(_SMALL, dtype, with_activation=False))
        flop = _break_even(large, small, sizes, min_gain)
        if flop is not None:
            found[key(dtype, with_activation=with_activation)] = flop
    return found


def _break_even(
    large: tuple[float, float], small: tuple[float, float], sizes: tuple[int, int, int], min_gain: float
) -> int | None:
    """Operations from which oneDNN's faster arithmetic outweighs its longer call; None where it is not faster.

    Args:
        large: seconds of a product of those sizes by aten and by oneDNN.
        small: the same where only the call counts, without activation: Inductor's kernel is called in no time.
        sizes: m, n and k of the large one.
        min_gain: how many times faster oneDNN must be in it.
    """
    aten, onednn = large
    if aten <= min_gain * onednn:
        return None
    saved_per_flop = (aten - onednn) / (2 * math.prod(sizes))
    longer_call = max(0.0, small[1] - small[0])
    # A power of two, so that another probe of the same machine gives the same number and finds the same kernels cached.
    return 1 << max(MIN_FLOP, math.ceil(_MARGIN * longer_call / saved_per_flop)).bit_length()


_Products = list[Callable[[], torch.Tensor]]


def _contenders(sizes: tuple[int, int, int], dtype: torch.dtype, with_activation: bool) -> tuple[_Products, _Products]:
    """The three products of one Linear's training step, or its forward with GELU, by aten and by oneDNN."""
    rows, out_features, in_features = sizes
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, in_features), (out_features, in_features), (rows, out_features))
    )
    linear = compat.onednn_linear()
    assert linear is not None
    if with_activation:
        # Inductor's own kernel computes half types in float32. Eager's GELU in bfloat16 takes half as long as either.
        return (
            [lambda: torch.nn.functional.gelu(torch.mm(x, weight.t()).float()).to(dtype)],
            [lambda: linear(x, weight, None, "gelu", [], "none")],
        )
    operands = ((x, weight), (grad, weight.t()), (grad.t(), x.t()))
    return (
        [functools.partial(torch.mm, a, b.t()) for a, b in operands],
        [functools.partial(linear, a, b, None, "none", [], "") for a, b in operands],
    )


def _seconds_per_product(aten: _Products, onednn: _Products) -> tuple[float, float]:
    """On average over the products, of each the least time: the one that other processes have not disturbed."""
    runs = (*aten, *onednn)
    for run in runs:
        run()  # warm-up
    least = [math.inf] * len(runs)
    # All take turns, so that a change of the machine's speed hits all.
    for _ in range(_REPEATS):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            least[i] = min(least[i], time.perf_counter() - start)
    return sum(least[: len(aten)]) / len(aten), sum(least[len(aten) :]) / len(onednn)


def _machine() -> str:
    """All that a verdict depends on. Hypervisors give one name to processors with and without bfloat16 arithmetic."""
    return "; ".join(
        (
            processor(),
            f"PyTorch uses {instruction_set()}",
            onednn.abilities(),
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, probe {_VERSION}",
        )
    )


def _cache_file() -> Path:
    digest = hashlib.sha256(_machine().encode()).hexdigest()[:16]
    return Path(compat.cache_dir()) / "fuse_pass" / f"gemm-{digest}.json"


def _write(path: Path, content: object) -> None:
    """Atomic, so that a second process never reads half a file. A read-only cache costs the next process a probe."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
