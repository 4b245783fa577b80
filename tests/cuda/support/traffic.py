"""What generated code launches, and what each launch reads and writes of global memory, counted without a device.

The wrapper runs on fake tensors. A launch of a Triton kernel reads each argument that it loads before it stores it, and
writes each that it stores, once: what it reads again comes from the cache. A launch of a library reads its tensors
and writes its result.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo import testing
from torch._inductor import async_compile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cuda.support import device

_GUARDS = torch._C._dynamo.guards


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, the bytes that it moves, and of a product its operations and what it multiplies."""

    kernel: str
    bytes: int
    operations: int = 0
    dtype: str = ""


@dataclass
class Traffic:
    """Of one graph, or of several.

    Attributes:
        launches: in order.
        arguments: bytes of the graph's tensors, in and out, each once: the least that a graph alone can move.
    """

    launches: list[Launch] = field(default_factory=list)
    arguments: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.launches + other.launches, self.arguments + other.arguments)

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def traffic_of(source: str) -> Traffic:
    """Of one wrapper."""
    traffic = Traffic()
    with device.fake_mode(), _counted_by(traffic.launches):
        names: dict[str, Any] = {"__name__": "captured"}
        exec(compile(source, "captured.py", "exec"), names)
        args = names["get_args"]()
        with _Calls(traffic.launches):
            results = names["call"](list(args))
        traffic.arguments = sum(_bytes_of(tensor) for tensor in _distinct((args, results)))
    return traffic


class _Kernel:
    """In the place of a compiled Triton kernel."""

    def __init__(self, name: str, source: str, launches: list[Launch]) -> None:
        self._name, self._launches = name, launches
        self._body = source[source.index("@triton.jit") :]
        signature = re.search(r"def \w+\((.*?)\):", self._body, re.DOTALL)
        assert signature is not None
        self._parameters = [parameter.partition(":")[0].strip() for parameter in signature[1].split(",")]

    def run(self, *args: Any, **_: Any) -> None:
        moved = 0
        for parameter, value in zip(self._parameters, args, strict=False):
            if isinstance(value, Tensor):
                moved += _bytes_of(value) * self._passes_over(parameter)
        self._launches.append(Launch(self._name, moved))

    def _passes_over(self, parameter: str) -> int:
        load, store = rf"tl\.load\({parameter}\b", rf"tl\.(?:store|atomic_add)\({parameter}\b"
        first_load, first_store = re.search(load, self._body), re.search(store, self._body)
        is_read = first_load and not (first_store and first_store.start() < first_load.start())
        return bool(is_read) + bool(first_store)


class _Calls(TorchDispatchMode):
    """Notes the calls of libraries."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_free(func):
            operations, dtype = _operations(str(func), args, result)
            moved = sum(_bytes_of(tensor) for tensor in _distinct((args, kwargs, result)))
            self._launches.append(Launch(str(func), moved, operations, dtype))
        return result


def _is_free(func: Any) -> bool:
    """Whether a call moves nothing: a view, or memory that nobody has written to yet."""
    name = func.overloadpacket.__name__
    queries = ("empty", "new_empty", "_unsafe_view", "sym_", "is_")
    return func.namespace == "prim" or func.is_view or name.startswith(queries)


def _operations(name: str, args: Any, result: Any) -> tuple[int, str]:
    """Of a product or an attention, with the dtype of its factors; none of others."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if "attention" in name:
        query = tensors["backward" in name]
        batch, heads, time, dim = query.shape
        return (10 if "backward" in name else 4) * batch * heads * time**2 * dim, str(query.dtype)
    if "mm" in name or "int8_product" in name:
        first = tensors["add" in name]
        return 2 * result.numel() * first.shape[-1], str(first.dtype)
    return 0, ""


def _distinct(values: Any) -> list[Tensor]:
    """The tensors in a tree of values, each once."""
    return list({id(value): value for value in tree_leaves(values) if isinstance(value, Tensor)}.values())


def _bytes_of(tensor: Tensor) -> int:
    """Of what a tensor covers of memory: an expanded dimension takes none."""
    elements = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements


@contextlib.contextmanager
def _counted_by(launches: list[Launch]) -> Iterator[None]:
    """Wrappers that are run inside allocate fake tensors and launch nothing."""

    class Compiler:
        def triton(self, name: str, source: str, device_str: str = "cuda") -> _Kernel:
            return _Kernel(name, source, launches)

        def wait(self, scope: Any) -> None:
            pass

    def empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    def random(size: Any, stride: Any, dtype: torch.dtype, device: str, extra_size: int = 0) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (async_compile, "AsyncCompile", Compiler),
            (testing, "rand_strided", random),
            (_GUARDS, "_empty_strided_cuda", empty_strided),
            (_GUARDS, "_reinterpret_tensor", lambda t, size, stride, offset=0: t.as_strided(size, stride, offset)),
            (_GUARDS, "assert_size_stride", lambda *_: None),
            (_GUARDS, "assert_alignment", lambda *_: None),
            (_GUARDS, "copy_if_misaligned", lambda tensor: tensor),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
