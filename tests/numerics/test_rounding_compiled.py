"""The quantisation ops under torch.compile, export and autograd: the same bits, one kernel, straight gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fuse_pass.numerics.formats import FloatFormat, formats
from fuse_pass.numerics.rounding import ROUNDINGS
from tests.numerics.test_rounding import critical, quantize, same_bits
from tests.oracle import DETERMINISTIC

SEED = torch.tensor(0x0123456789ABCDEF)
COMPILED = [
    FloatFormat(5, 10),
    FloatFormat(8, 7),
    formats["fp8_e4m3"],
    formats["fp8_e5m2fnuz"],
    formats["fp4_e2m1"],
    FloatFormat(9, 4),
]


def every_mode(x: Tensor, fmt: FloatFormat, seed: Tensor) -> list[Tensor]:
    overflow = "ieee" if fmt.has_nan else "saturate"
    return [
        quantize(x, fmt, mode, subnormal=subnormal, overflow=overflow, seed=seed if "stoc" in mode else None)
        for mode in ROUNDINGS
        for subnormal in (True, False)
    ]


@pytest.mark.parametrize("fmt", COMPILED, ids=lambda fmt: fmt.name)
def test_compiled_equals_eager(fmt: FloatFormat) -> None:
    assert_compiled_equals_eager(fmt, np.float32)


@pytest.mark.parametrize(
    "fmt",
    [pytest.param(fmt, marks=[] if fmt == FloatFormat(5, 10) else pytest.mark.slow) for fmt in COMPILED],
    ids=lambda fmt: fmt.name,
)
def test_compiled_equals_eager_in_float64(fmt: FloatFormat) -> None:
    assert_compiled_equals_eager(fmt, np.float64)


def assert_compiled_equals_eager(fmt: FloatFormat, dtype: type[np.floating]) -> None:
    x = torch.from_numpy(critical(fmt, dtype))
    x = x[torch.randperm(len(x))[:5003]]  # no multiple of a vector's length
    compiled = torch.compile(every_mode, fullgraph=True)(x, fmt, SEED)
    for ours, eager in zip(compiled, every_mode(x, fmt, SEED), strict=True):
        assert same_bits(ours, eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compiled_equals_eager_in_half(dtype: torch.dtype) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    compiled = torch.compile(every_mode, fullgraph=True)(x, FloatFormat(4, 3), SEED)
    for ours, eager in zip(compiled, every_mode(x, FloatFormat(4, 3), SEED), strict=True):
        assert same_bits(ours, eager)


def test_compiled_with_dynamic_shapes() -> None:
    def three_modes(x: Tensor) -> list[Tensor]:
        return [quantize(x, FloatFormat(4, 3), mode, seed=SEED) for mode in ("nearest", "plus_inf", "stoc_prop")]

    compiled = torch.compile(three_modes, fullgraph=True, dynamic=True)
    for shape in ((3, 7), (5, 64), (4, 0)):
        x = torch.randn(shape)
        for ours, eager in zip(compiled(x), three_modes(x), strict=True):
            assert same_bits(ours, eager)


def test_exported_equals_eager() -> None:
    class Rounds(torch.nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return every_mode(x, FloatFormat(5, 2), SEED)

    x = torch.from_numpy(critical(FloatFormat(5, 2), np.float32))
    program = torch.export.export(Rounds(), (x,))
    assert any(node.target is torch.ops.fuse_pass.fake_quantize.default for node in program.graph.nodes)
    for ours, eager in zip(program.module()(x), every_mode(x, FloatFormat(5, 2), SEED), strict=True):
        assert same_bits(ours, eager)


@pytest.mark.parametrize("mode", ["nearest", "stoc_prop"])
def test_fuses_with_its_neighbours(mode: str) -> None:
    """One loop for scale, rounding and sum, and nothing is called."""

    def neighbours(x: Tensor, y: Tensor) -> Tensor:
        return quantize(x * 3, FloatFormat(4, 3), mode, seed=SEED if mode == "stoc_prop" else None) + y

    x, y = torch.randn(64, 100), torch.randn(64, 100)
    result, (code,) = run_and_get_code(torch.compile(neighbours), x, y)
    assert same_bits(result, neighbours(x, y))
    assert code.count("void  kernel(") == 1
    assert "torch.ops.fuse_pass" not in code


OPS = {
    "fake_quantize": (torch.randn(3, 5), None, 4, 3, 7, "fn", "nearest", True, "saturate", True),
    "fake_quantize_int": (torch.randn(3, 5), torch.tensor(0.1), None, None, -7, 7, "nearest", True),
    "fake_quantize_int learnt": (
        torch.randn(3, 5),
        torch.rand(3, 1) + 0.1,
        torch.ones(3, 1),
        SEED,
        -8,
        7,
        "stoc_prop",
        True,
    ),
    "clip_gradient": (torch.randn(3, 5), torch.randn(3, 5), -0.5, 0.7),
    "straight_through": (torch.randn(3, 5), torch.randn(3, 5)),
}


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    arguments = tuple(a.clone().requires_grad_() if isinstance(a, Tensor) and a.dim() else a for a in OPS[name])
    torch.library.opcheck(getattr(torch.ops.fuse_pass, name.split()[0]).default, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_gradient_goes_straight_through(dtype: torch.dtype) -> None:
    values = [0.3, -7.0, 300.0, -900.0, 0.0, float("inf"), float("nan"), 1e-7]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    grad = torch.arange(1.0, 9.0, dtype=dtype)
    for clip in (False, True):
        y = torch.ops.fuse_pass.fake_quantize(x, None, 4, 3, 7, "ieee", "nearest", True, "saturate", clip)
        (found,) = torch.autograd.grad(y, x, grad)
        kept = x.detach().abs() <= 240
        kept[6] = found[6] != 0  # NaN has not been clipped, nor has it not
        assert torch.equal(found, torch.where(kept, grad, 0.0) if clip else grad)


@pytest.mark.parametrize("clip", [False, True])
def test_gradients_of_the_gradient(clip: bool) -> None:
    x = torch.tensor([0.3, -7.0, 300.0], dtype=torch.float64, requires_grad=True)
    y = torch.ops.fuse_pass.fake_quantize(x * x, None, 4, 3, 7, "ieee", "nearest", True, "saturate", clip)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    kept = torch.tensor([1.0, 1.0, 0.0 if clip else 1.0], dtype=torch.float64)
    assert torch.equal(first.detach(), 2 * x.detach() * kept)
    assert torch.equal(second, 2 * kept)


def test_compiled_gradients_equal_eager() -> None:
    def loss(x: Tensor, w: Tensor) -> Tensor:
        y = torch.ops.fuse_pass.fake_quantize(x * w, None, 4, 3, 7, "fn", "nearest", True, "saturate", True)
        return (y * y).sum()

    x, w = (torch.randn(40, 50) * 20).requires_grad_(), (torch.randn(50) * 20).requires_grad_()
    eager = torch.autograd.grad(loss(x, w), (x, w))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, w), (x, w))
    assert (eager[0] == 0).any()
    assert torch.equal(compiled[0], eager[0])
    torch.testing.assert_close(compiled[1], eager[1])


def test_the_deterministic_modes_are_all_there() -> None:
    assert set(DETERMINISTIC) == {mode for mode in ROUNDINGS if "stoc" not in mode}
