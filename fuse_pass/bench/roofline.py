"""The limit of a row: the time in which this machine could do its matrix products, or move its bytes, and no less.

Both rates are measured in the run that they are compared with: the fastest of the GEMM providers that PyTorch has,
on shapes of transformers, and a copy between two buffers that together are as large as what the row must move.
A share of the limit above 90 % means that there is nothing left to gain but noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fuse_pass.bench.contenders import Step, tensors_of
from fuse_pass.commands.timing import seconds
from fuse_pass.inductor import compat

PRODUCTS, MEMORY = "products", "memory"
_SHAPES = ((512, 768, 3072), (512, 3072, 768), (2048, 768, 3072))
_REPEATS = 7
_HALVES = (torch.float16, torch.bfloat16)
_LARGEST_COPY = 1 << 28
# In less than this time the call itself is the limit, not what it computes.
_MIN_SECONDS = 20e-6


@dataclass(frozen=True)
class Limit:
    """The least time of a row and what sets it (PRODUCTS or MEMORY)."""

    seconds: float
    by: str

    @property
    def is_meaningful(self) -> bool:
        return self.seconds >= _MIN_SECONDS


def product_rates(dtypes: Iterable[torch.dtype], device: str) -> dict[torch.dtype, float]:
    """FLOP/s of the fastest matrix product by dtype: best of several shapes and providers.

    A half type that the CPU does not multiply in hardware takes the rate of float32, through which it can go.
    """
    return {dtype: max(_product_rates(_multiplied_as(dtype, device), device)) for dtype in dict.fromkeys(dtypes)}


def _multiplied_as(dtype: torch.dtype, device: str) -> torch.dtype:
    is_slow = device == "cpu" and dtype in _HALVES and not compat.has_fast_cpu_dtype(dtype)
    return torch.float32 if is_slow else dtype


def _product_rates(dtype: torch.dtype, device: str) -> Iterator[float]:
    for rows, inner, columns in _SHAPES:
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        weight = torch.randn(columns, inner, device=device, dtype=dtype)
        for provider in _providers(x, weight):
            yield 2 * rows * inner * columns / _best_seconds(provider)


def _providers(x: Tensor, weight: Tensor) -> Iterator[Callable[[], object]]:
    yield lambda: torch.mm(x, weight.t())
    linear = compat.onednn_linear()
    if x.device.type == "cpu" and linear is not None and x.dtype in (torch.float32, *_HALVES):
        packed = compat.pack_onednn_weight(weight, x.shape[0])
        yield lambda: linear(x, weight, None, "none", [], "")
        yield lambda: linear(x, packed, None, "none", [], "")


def copy_rate(count: int, device: str) -> float:
    """Bytes read and written per second by a copy that moves `count` bytes."""
    half = max(min(count, _LARGEST_COPY) // 2, 64)
    source = torch.ones(half, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * half / _best_seconds(lambda: target.copy_(source))


def limit(step: Step, rate: float, device: str) -> Limit:
    """The least time of one step, given the rate of its products in FLOP/s."""
    products = flop(step) / rate
    moved = least_bytes(step)
    memory = moved / copy_rate(moved, device)
    return Limit(products, PRODUCTS) if products > memory else Limit(memory, MEMORY)


def flop(step: Step) -> int:
    """Floating-point operations of the matrix products and convolutions of one step, counted in eager PyTorch."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def least_bytes(step: Step) -> int:
    """What one step must at least read and write: parameters, inputs and outputs, and for training their gradients."""
    example = step.example
    inputs = tensors_of((example.args, example.kwargs))
    if step.row.passes is not None:
        return step.row.passes * inputs[0].nbytes
    outputs = tensors_of(step.forward())
    parameters = list(example.model.parameters())
    forward = sum(tensor.nbytes for tensor in (*parameters, *inputs, *outputs))
    # Backward reads weights and inputs once more with the gradients of the outputs, and writes one gradient per leaf.
    return forward * 2 + sum(leaf.nbytes for leaf in step.leaves) if step.row.train else forward


def _best_seconds(run: Callable[[], object]) -> float:
    """The fastest of some calls: a limit is what the machine can do when nothing disturbs it."""
    run()
    return min(seconds(run) for _ in range(_REPEATS))
