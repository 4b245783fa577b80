"""Weights that stay as they are, packed once into the order in which oneDNN reads them.

oneDNN brings a plain weight into that order in every call, which takes longer than the product itself where rows are
few. Measured (AMD Zen 5, one thread, 768 → 3072, weights cold in cache) against `torch.mm`: 8 rows 2.4 times as fast in
float32 and 1.9 in bfloat16, 64 rows 2.4 and 1.3, 256 rows 2.4 and 1.05.

A packed copy belongs to one weight and goes with it. It is used only while the weight is the same memory with the same
version counter and the same value at some places all over it. PyTorch's version counter notices everything that
writes, but for writes through `.data`, NumPy or another process: of those only the places notice. A weight is packed
the second time it is found unchanged, so that one that changes from call to call costs no packing.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fuse_pass.gemm import onednn
from fuse_pass.inductor import private

_PLACES = 64
_DTYPES = (torch.float32, torch.bfloat16)
# oneDNN asks for the rows that a weight is packed for; what it does for many is as fast for one.
_ROWS = 512


@dataclass(frozen=True)
class _Entry:
    """What is known about one weight.

    Attributes:
        state: its address and version.
        places: its value at some places; a weight with NaN there is never found unchanged.
        packed: the packed copy; None until the weight was found unchanged once.
    """

    state: tuple[int, int]
    places: Tensor
    packed: Tensor | None = None


_Where = tuple[int | torch.SymInt, tuple[int, ...], torch.dtype]


class PackedWeights:
    """Packed copies by the memory that they were made from; freed with it. Together at most as large as that memory.

    The memory is what is watched, not the tensor: `torch.utils.swap_tensors` refuses a tensor that is watched.
    """

    def __init__(self) -> None:
        self._by_storage: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def of(self, weight: Tensor) -> Tensor | None:
        """The packed copy of a `[n, k]` weight as it is now; None where it has changed or cannot be watched."""
        if weight.is_inference() or not weight.is_contiguous() or weight.dtype not in _DTYPES or not weight.numel():
            return None
        where = (weight.storage_offset(), tuple(weight.shape), weight.dtype)
        state = (weight.data_ptr(), private.version_of(weight))
        values = weight.detach()
        places = torch.take(values, _places(weight.numel()))
        storage = weight.untyped_storage()
        with self._lock:
            entry: _Entry | None = self._by_storage.get(storage, {}).get(where)
        if entry is None or entry.state != state or not torch.equal(entry.places, places):
            self._keep(storage, where, _Entry(state, places))
            return None
        if entry.packed is None:
            try:
                entry = _Entry(state, places, onednn.pack(values, _ROWS))
            except onednn.NoPrimitiveError:  # nor has the product: it is named there
                return None
            self._keep(storage, where, entry)
        return entry.packed

    def _keep(self, storage: torch.UntypedStorage, where: _Where, entry: _Entry) -> None:
        with self._lock:
            entries = self._by_storage.setdefault(storage, {})
            entries.pop(where, None)
            if sum(_nbytes(other) for other in (*entries, where)) > storage.nbytes():
                entries.clear()
            entries[where] = entry

    def __len__(self) -> int:
        """How many packed copies there are."""
        with self._lock:
            return sum(entry.packed is not None for entries in self._by_storage.values() for entry in entries.values())


def _nbytes(where: _Where) -> int:
    _, (rows, columns), dtype = where
    return rows * columns * dtype.itemsize


@functools.cache
def _places(count: int) -> Tensor:
    """Positions spread over `count` elements, by multiples of the golden ratio: not in one row nor in one column."""
    golden = (5**0.5 - 1) / 2
    return torch.tensor([int(i * golden % 1 * count) for i in range(1, _PLACES + 1)])


PACKED = PackedWeights()
