"""`absmax_quantize` and `FloatPrecisionSimulator`."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

from fuse_pass.numerics.rounding import ROUNDINGS
from fuse_pass.quantization.functional import FloatPrecisionSimulator, absmax_quantize

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# --- absmax_quantize --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8, 9, 16])
@pytest.mark.parametrize("dim", [None, 0, -1, (0, 2)], ids=str)
def test_absmax(bits: int, dim: Any, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 5).to(dtype).requires_grad_()
    quant, dequant = absmax_quantize(x, bits, dim=dim)
    levels = 2 ** (bits - 1) - 1
    wide = x.detach() if dtype is torch.float64 else x.detach().float()
    largest = wide.abs().amax(tuple(range(3)) if dim is None else dim, keepdim=True)
    expected = torch.round(wide * levels / largest).clamp(-levels, levels)
    assert quant.dtype is (torch.int8 if bits <= 8 else torch.int16)
    assert torch.equal(quant, expected.to(quant.dtype))
    assert torch.equal(dequant, (expected * largest / levels).to(dtype))
    assert torch.equal(torch.autograd.grad(dequant, x, torch.full_like(x, 3))[0], torch.full_like(x, 3))


def test_absmax_of_what_has_no_scale() -> None:
    for shape in ((3, 4), (), (0,), (2, 0)):
        quant, dequant = absmax_quantize(torch.zeros(shape))
        assert torch.equal(quant, torch.zeros(shape, dtype=torch.int8))
        assert torch.equal(dequant, torch.zeros(shape))
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            absmax_quantize(torch.tensor([1.0, value]))


@pytest.mark.parametrize("largest", [3.4e38, 1e-40, 2.0**64])
def test_absmax_at_the_ends_of_the_range(largest: float) -> None:
    quant, dequant = absmax_quantize(torch.tensor([largest, -largest, largest / 2, 0.0]), 16)
    assert quant[:2].tolist() == [32767, -32767]
    assert dequant[0].item() == pytest.approx(largest, rel=1e-5)
    assert dequant.isfinite().all()


@pytest.mark.parametrize(("bits", "kind"), [(1, ValueError), (17, ValueError), (8.0, TypeError), (True, TypeError)])
def test_absmax_bits(bits: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="bits must"):
        absmax_quantize(torch.ones(3), bits)


def test_compiled_absmax_equals_eager() -> None:
    x = torch.randn(7, 75)
    for ours, eager in zip(torch.compile(absmax_quantize, fullgraph=True)(x, 8), absmax_quantize(x, 8), strict=True):
        assert torch.equal(ours, eager)


# --- FloatPrecisionSimulator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", range(10))
def test_simulator_rounds_by_number_and_name(mode: int) -> None:
    x = torch.randn(100) * 100
    by_number = FloatPrecisionSimulator(5, 2, mode, generator_seed=1)
    by_name = FloatPrecisionSimulator(5, 2, ROUNDINGS[mode], generator_seed=1)
    assert (by_number.rmode, by_number.exp_bits, by_number.sig_bits) == (mode, 5, 2)
    assert torch.equal(by_number(x), by_name.quantize(x))


def test_simulator_is_ieee_style() -> None:
    assert FloatPrecisionSimulator(4, 3)(torch.tensor([247.9, 248.0])).tolist() == [240.0, math.inf]
    assert FloatPrecisionSimulator(4, 3, overflow="saturate")(torch.tensor([1e9, math.inf])).tolist() == [
        240.0,
        math.inf,
    ]
    assert FloatPrecisionSimulator(4, 3, subnormal=False)(torch.tensor([2.0**-9])).item() == 0
    x = torch.randn(1000)
    assert torch.equal(FloatPrecisionSimulator(5, 10)(x), x.half().float())
    assert torch.equal(FloatPrecisionSimulator(11, 52)(x.double()), x.double())
    assert torch.equal(FloatPrecisionSimulator(8, 10, "toward_zero")(x), FloatPrecisionSimulator(8, 10, 4)(x))


def test_simulator_draws_anew_at_every_call() -> None:
    x = torch.full((1000,), 1.03)
    simulator = FloatPrecisionSimulator(4, 3, 5, generator_seed=3)
    first, second = simulator(x), simulator(x)
    assert not torch.equal(first, second)
    again = FloatPrecisionSimulator(4, 3, 5, generator_seed=3)
    assert torch.equal(again(x), first)
    assert torch.equal(again(x), second)
    unseeded = FloatPrecisionSimulator(4, 3, "stoc_equal")
    torch.manual_seed(4)
    drawn = unseeded(x)
    assert not torch.equal(unseeded(x), drawn)
    torch.manual_seed(4)
    assert torch.equal(unseeded(x), drawn)


def test_simulator_copies_continue_alike() -> None:
    simulator = FloatPrecisionSimulator(4, 3, 5, generator_seed=3)
    x = torch.full((1000,), 1.03)
    simulator(x)
    copies = [copy.deepcopy(simulator), pickle.loads(pickle.dumps(simulator)), copy.deepcopy(simulator)]
    results = [each(x) for each in copies]
    assert all(torch.equal(result, simulator(x)) for result in results[:1])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("rmode", [1, 5])
def test_simulator_compiles_whole(rmode: int) -> None:
    eager, traced = (FloatPrecisionSimulator(4, 3, rmode, generator_seed=9) for _ in range(2))
    compiled = torch.compile(lambda x: traced(x * 2) + 1, fullgraph=True)
    x = torch.randn(30, 40)
    for _ in range(3):
        assert torch.equal(compiled(x), eager(x * 2) + 1)
