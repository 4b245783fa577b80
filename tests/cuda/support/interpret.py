"""Runs what is generated for the pretended device on CPU tensors, by Triton's interpreter (TRITON_INTERPRET=1).

The interpreter has no libdevice, so that NumPy stands in for it; it truncates where it stores bfloat16, so that float32
is compared; it divides exactly, so that it cannot show an approximate quotient (`kernels` does).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor, nn
from torch._inductor.codecache import PyCodeCache
from triton.runtime.interpreter import TensorHandle

from fuse_pass import FuseBackend
from fuse_pass.inductor import compat
from fuse_pass.numerics import random_bits
from tests.cuda.support.capture import capture
from tests.cuda.support.cases import CASES, SMALL

aten = torch.ops.aten
_GUARDS = torch._C._dynamo.guards
_SEED_RANGE = -(2**63), 2**63 - 1


def check(name: str) -> dict[str, Any]:
    """How far results and gradients are from those of eager float64 with the same masks, and from the CPU's own bits.

    Errors are relative to the largest element. `differing` counts the elements of each result that have not the bits
    of the same function run eagerly on a CPU, with the same masks.
    """
    case = CASES[name]
    inputs: list[Any] = []
    backend = FuseBackend(strict=True, **case.options)

    def spy(gm: Any, example_inputs: Sequence[Any], **options: Any) -> Any:
        inputs.extend(example_inputs)
        return backend(gm, example_inputs, **options)

    fake: list[Any] = []

    def make() -> Any:
        fake.extend(case.build(SMALL))
        return tuple(fake)

    sources = capture(make, spy, train=case.train, autocast=case.autocast)
    function, args = case.build(SMALL, "cpu")
    real = dict(zip(map(id, _leaves(*fake)), _leaves(function, args), strict=True))
    given = [real[id(value)] for value in inputs]
    torch.manual_seed(0)
    results = _run(sources.forward[0], [value.detach() for value in given])
    torch.manual_seed(0)
    exact_function, exact_args = _in_float64(function, args)
    with _our_masks(_seeds(sources.forward[0])):
        exact = _as_tuple(exact_function(*exact_args))
    torch.manual_seed(0)
    with _our_masks(_seeds(sources.forward[0])):
        of_cpu = _as_tuple(function(*args))
    found = {
        "errors": [_error(ours, true) for ours, true in zip(results, exact, strict=False)],
        "differing": [_differing(ours, cpu) for ours, cpu in zip(results, of_cpu, strict=False)],
    }
    if sources.backward:
        tangents = [torch.randn_like(result) for result in of_cpu]
        grads = _run(sources.backward[0], [*results[len(exact) :], *tangents])
        wanted = _leaves(exact_function, exact_args)
        true_grads = torch.autograd.grad(exact, wanted, [tangent.double() for tangent in tangents])
        true_of = dict(zip(map(id, _leaves(function, args)), true_grads, strict=True))
        found["gradient_errors"] = [
            _error(grad, true_of[id(value)])
            for value, grad in zip(given, grads, strict=True)
            if isinstance(grad, Tensor)
        ]
    return found


def _leaves(function: Any, args: Sequence[Any]) -> list[Tensor]:
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    return [*parameters, *(arg for arg in args if isinstance(arg, Tensor))]


def _in_float64(function: Any, args: Sequence[Any]) -> tuple[Any, list[Any]]:
    exact = copy.deepcopy(function).double() if isinstance(function, nn.Module) else function
    wide = [arg.detach().double().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args]
    return exact, wide


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _error(ours: Tensor, true: Tensor) -> float:
    largest = true.abs().max().clamp(min=1e-30)
    return ((ours.double() - true).abs().max() / largest).item()


def _differing(ours: Tensor, cpu: Tensor) -> int:
    as_bits = {4: torch.int32, 2: torch.int16}[ours.element_size()]
    same = (ours.contiguous().view(as_bits) == cpu.detach().contiguous().view(as_bits)) | (ours.isnan() & cpu.isnan())
    return int((~same).sum())


# --- masks


def _seeds(source: str) -> list[Tensor]:
    """What a wrapper draws, from a generator that stands where it stood before the wrapper ran."""
    drawn: list[Tensor] = []
    if "randint.low_out" in source:
        count = int(source.partition("randint.low_out(")[2].partition("[")[2].partition("]")[0])
        drawn = list(aten.randint.low_out(*_SEED_RANGE, [count], out=torch.empty(count, dtype=torch.int64)))
    return drawn


@contextlib.contextmanager
def _our_masks(seeds: list[Tensor]) -> Iterator[None]:
    """`F.dropout` that drops what our op would, and stochastic rounding, each call with the next of the seeds."""
    left = iter(seeds)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        columns = x.shape[-1]
        keep = random_bits.keep_mask(next(left), x.numel() // columns, columns, p).view(x.shape)
        return torch.where(keep, x * (1 / (1 - p)), 0.0)

    with (
        mock.patch.object(torch.nn.functional, "dropout", dropout),
        mock.patch.object(compat, "inductor_seed", side_effect=lambda device: next(left)),
    ):
        yield
    assert next(left, None) is None, "the graph draws more seeds than the model asks for"


# --- the interpreter


def _run(wrapper: str, args: list[Any]) -> tuple[Any, ...]:
    source = wrapper.replace("device='cuda'", "device='cpu'").replace("'cuda:0'", "'cpu'")
    load = PyCodeCache.load

    def load_interpreted(kernel: str, *more: Any, **others: Any) -> Any:
        of_libdevice = "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math"
        assert of_libdevice in kernel
        ours = of_libdevice.replace("libdevice, ", "") + f"\nfrom {__name__} import LibDevice as libdevice"
        return load(kernel.replace(of_libdevice, ours), *more, **others)

    names: dict[str, Any] = {"__name__": "captured"}
    with (
        mock.patch.object(PyCodeCache, "load", load_interpreted),
        mock.patch.object(_GUARDS, "_empty_strided_cuda", _GUARDS._empty_strided_cpu),
    ):
        exec(compile(source, "captured.py", "exec"), names)
        return names["call"](args)


def _by_numpy(function: Callable[..., Any]) -> Any:
    def run(x: Any, *others: Any) -> Any:
        data = x.handle.data
        result = function(data, *(other.handle.data for other in others)).astype(data.dtype)
        return tl.core.tensor(TensorHandle(result, x.handle.dtype), x.type)

    return staticmethod(run)


class LibDevice:
    """What generated kernels call of libdevice."""

    rsqrt = _by_numpy(lambda x: 1 / np.sqrt(x.astype(np.float64)))
    sqrt = _by_numpy(np.sqrt)
    exp = _by_numpy(np.exp)
    tanh = _by_numpy(np.tanh)
    erf = _by_numpy(np.vectorize(math.erf, otypes=[np.float64]))
    nearbyint = _by_numpy(np.rint)
    trunc = _by_numpy(np.trunc)
    floor = _by_numpy(np.floor)
    cos = _by_numpy(np.cos)
    sin = _by_numpy(np.sin)
    pow = _by_numpy(np.power)
