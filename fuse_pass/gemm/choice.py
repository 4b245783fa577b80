"""Which library multiplies matrices fastest here: a one-off timed probe, kept in a file per machine.

Measured on one AMD Zen 5 core (torch 2.13): float32 `addmm` (MKL) runs at 88-98 GF/s, oneDNN's linear on plain weights
at 180-217 GF/s in all three products of a Linear (forward, input gradient, weight gradient). On other machines the two
may be level, so it is measured and not assumed.

Measured too is the size from which the longer call pays (14 us against 1.5 us there, so from about 3 MFLOP). Thin
products are as fast with aten at any size: an outer product and a result of one to three columns took oneDNN up to six
times as long, one or two rows up to 1.6 times, a weight gradient of less than 64 columns up to 1.5 times (it transposes
both operands first).

With up to four rows neither library reads the weight as fast as memory gives it. There Inductor's own loop over sums is
faster than both (768 x 3072, torch 2.13: one row 99 us against 137 in float32 and 102 against 158 in bfloat16, four
rows 157 against 276 by oneDNN and 404 by MKL), and the activation costs no call of its own.

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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fuse_pass.gemm import onednn
from fuse_pass.gemm.machine import instruction_set, processor
from fuse_pass.inductor import compat

ATEN, ONEDNN, VIA_FLOAT32 = "aten", "onednn", "via_float32"

# Rows up to which sums are faster. Two and more pay from so many elements of the weight on; a single row always does,
# but for sizes that Inductor knows itself.
_MAX_ROWS_OF_SUMS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
_MIN_ELEMENTS_OF_SUMS = 1 << 14
_DECOMPOSED_BY_INDUCTOR = 16

# A product has at least as many operations where oneDNN is chosen, however small the measured break-even is.
MIN_FLOP = 1_000_000
# oneDNN must be this much faster to be chosen; a tie goes to aten, which Inductor knows how to fuse and tune.
MIN_GAIN = 1.1
# With an activation in the same call a pass over memory is saved too, so that a smaller gain is one.
MIN_GAIN_WITH_ACTIVATION = 1.02
# Chosen from this many times the break-even on: at it nothing is gained, and our op adds a third to the call.
_MARGIN = 4
_MIN_ROWS, _MIN_COLUMNS, _MIN_COLUMNS_OF_GRADIENT, _MIN_INNER = 3, 4, 64, 2
_LARGE, _SMALL = (256, 768, 768), (1, 16, 16)
# Fewer summed columns, so that the activation is more of the whole than noise.
_LARGE_WITH_ACTIVATION = (256, 768, 384)
_REPEATS = 15
# Elements of a weight from which a packed copy saves more than it takes to see that the weight has not changed (30 us).
_MIN_PACKED = 1 << 19
# Another number where the probe asks something else, so that verdicts of before are not found.
_VERSION = 3


def provider(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[int | None] = (),
    *,
    with_activation: bool = False,
    weight_gradient: bool = False,
) -> str:
    """Who computes a product `[m, k] @ [n, k].T`: ATEN, ONEDNN or VIA_FLOAT32.

    VIA_FLOAT32 is for float16 on a CPU without float16 arithmetic, where aten falls to a scalar loop.

    Args:
        device: of the operands.
        dtype: of the operands.
        sizes: m, n and k; None where a size is unknown, which is taken as large.
        with_activation: an activation follows in the same call.
        weight_gradient: both operands are transposed.
    """
    if device.type != "cpu":
        return ATEN
    if dtype is torch.float16 and not compat.has_fast_cpu_dtype(dtype):
        return VIA_FLOAT32
    known = [size for size in sizes if size is not None]
    flop = 2 * math.prod(known) if known and len(known) == len(sizes) else None
    if (flop is not None and flop < MIN_FLOP) or _is_thin(sizes, weight_gradient):
        return ATEN
    break_even = table().get(_key(dtype, with_activation))
    pays = break_even is not None and (flop is None or flop >= break_even)
    return ONEDNN if pays and onednn.multiplies(dtype) else ATEN


def sums_pay(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[int | torch.SymInt], *, column_major: bool
) -> bool:
    """Whether a product `[m, k] @ [n, k].T` is fastest as sums of k products each, in code that Inductor generates.

    Args:
        device: of the operands.
        dtype: of the operands.
        sizes: m, n and k; m counts only if it is no symbol.
        column_major: the second operand is stored `[k, n]`.
    """
    rows, columns, inner = sizes
    if device.type != "cpu" or not isinstance(rows, int) or not 1 <= rows <= _MAX_ROWS_OF_SUMS.get(dtype, 0):
        return False
    if (column_major and dtype is torch.float32) or not compat.has_vector_loops():
        return False
    known = [size for size in (columns, inner) if isinstance(size, int)]
    if rows > 1:
        return len(known) < 2 or math.prod(known) >= _MIN_ELEMENTS_OF_SUMS
    return max(known, default=1) > _DECOMPOSED_BY_INDUCTOR and columns != 1


def prepacking_pays(device: torch.device, dtype: torch.dtype, sizes: Sequence[int | None]) -> bool:
    """Whether a product with a `[n, k]` weight that oneDNN has packed before is faster than any with a plain one.

    It is with any number of rows: what packing takes is saved in every call.

    Args:
        device: of the operands.
        dtype: of the operands.
        sizes: n and k; None where a size is unknown.
    """
    known = [size for size in sizes if size is not None]
    if device.type != "cpu" or len(known) < len(sizes) or math.prod(known) < _MIN_PACKED:
        return False
    if not onednn.multiplies(dtype) or _is_thin((None, *sizes), weight_gradient=False):
        return False
    if dtype is torch.bfloat16:
        return True  # aten calls oneDNN too
    return dtype is torch.float32 and _key(dtype, with_activation=False) in table()


def _is_thin(sizes: Sequence[int | None], weight_gradient: bool) -> bool:
    if not sizes:
        return False
    rows, columns, inner = sizes
    if rows is not None and rows < _MIN_ROWS:
        return True
    min_columns = _MIN_COLUMNS_OF_GRADIENT if weight_gradient else _MIN_COLUMNS
    return (columns is not None and columns < min_columns) or (inner is not None and inner < _MIN_INNER)


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
    is_ours = isinstance(found, dict) and all(_is_entry(key, flop) for key, flop in found.items())
    return found if is_ours else None


def _is_entry(key: str, flop: object) -> bool:
    """Whether a key is one that `_key` makes and a number one that `_break_even` returns: a bool, too, is an int."""
    return key in _KEYS and type(flop) is int and flop >= MIN_FLOP


def _key(dtype: torch.dtype, with_activation: bool) -> str:
    return f"{str(dtype).removeprefix('torch.')}{'+activation' if with_activation else ''}"


_PROBED = (torch.float32, torch.bfloat16)
_KEYS = tuple(_key(dtype, with_activation) for dtype in _PROBED for with_activation in (False, True))


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
            found[_key(dtype, with_activation)] = flop
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
