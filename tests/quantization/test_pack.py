"""Packed Linear layers: what they compute, and what they hold."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

import fuse_pass
from fuse_pass import BitLinear, PackSpec, pack, unpack
from fuse_pass.inductor.cpp_compiler import cpp_compiler
from fuse_pass.kernels import few_bits
from fuse_pass.nn import Int8Linear, PackedLinear
from fuse_pass.quantization.packing import GROUPS, SPECS, TABLES

pytestmark = pytest.mark.processor
ALL = [
    *(PackSpec(name) for name in SPECS),
    *(
        PackSpec("int4_weight_only", group=group, symmetric=symmetric)
        for group in GROUPS
        for symmetric in (True, False)
    ),
    PackSpec("nf4", group=32),
    PackSpec("llm_int8", threshold=0.0),
]
IDS = [f"{spec.name} {spec.group} {spec.symmetric} {spec.threshold}" for spec in ALL]
every_spec = pytest.mark.parametrize("spec", ALL, ids=IDS)


def linear(d_in: int = 96, d_out: int = 50, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(d_in, d_out, bias=bias)


def packed_of(layer: nn.Linear, spec: PackSpec) -> PackedLinear:
    found = pack(layer, spec)
    assert isinstance(found, PackedLinear)
    return found


def rounded_inputs(x: Tensor, spec: PackSpec, real: PackedLinear) -> Tensor:
    """What a kind makes of its inputs, float64, written down from the papers."""
    wide = x.double()
    if spec.kind in ("b1", "b1.58"):
        largest = wide.abs().amax(-1, keepdim=True) if spec.kind == "b1.58" else wide.abs().max()
        return torch.round(wide * 127 / largest) * largest / 127
    if spec.kind == "weight_only":
        return wide
    outliers = (
        (wide.abs() > spec.threshold).any(0) if spec.kind == "llm_int8" and spec.threshold else wide.new_zeros(())
    )
    inside = torch.where(outliers.bool(), 0.0, wide)
    largest = inside.abs().amax(-1, keepdim=True)
    return torch.where(outliers.bool(), wide, torch.round(inside * 127 / largest) * largest / 127)


@every_spec
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("d_in", "d_out"), [(96, 50), (100, 17), (64, 128), (7, 3), (1, 1)])
def test_computes_with_the_real_numbers_that_its_codes_stand_for(
    d_in: int, d_out: int, bias: bool, spec: PackSpec
) -> None:
    layer, x = linear(d_in, d_out, bias=bias), torch.randn(5, d_in, generator=torch.Generator().manual_seed(1))
    x[:, 0] *= 10  # an outlier
    packed = packed_of(layer, spec)
    weight = packed.real_weight().double()
    rounded = rounded_inputs(x, spec, packed)
    exact = rounded @ weight.t() + (0 if layer.bias is None else layer.bias.double())
    magnitudes = rounded.abs() @ weight.abs().t() + 1
    assert ((packed(x).double() - exact).abs() <= (d_in + 8) * torch.finfo(torch.float32).eps * magnitudes).all()


LARGEST_STEP = {"int4": 1 / 2, "fp4": 1.0}


@every_spec
def test_weights_are_rounded_to_the_nearest_code(spec: PackSpec) -> None:
    layer = linear(128, 32)
    real, weight = packed_of(layer, spec).real_weight(), layer.weight.detach()
    error = (real - weight).abs()
    if spec.table:
        values = torch.tensor(TABLES[spec.table]).sort().values
        groups = weight.view(32, -1, spec.group)
        if spec.name == "int4_weight_only" and not spec.symmetric:
            step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
            assert (error.view_as(groups).amax(-1) <= step * 1.01).all(), "the zero is rounded too"
            return
        largest = torch.maximum(groups.amin(-1) / values[0], groups.amax(-1) / values[-1])
        if spec.table != "int4":
            largest = groups.abs().amax(-1) / values.abs().max()
        nearest = (groups.unsqueeze(-1) - values * largest[..., None, None]).abs().amin(-1)
        torch.testing.assert_close(error.view_as(groups), nearest, rtol=0, atol=1e-6)
    elif spec.bits == 8:
        assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all()
    else:
        reference = BitLinear.from_float(layer, variant=spec.name).pack().unpack()
        assert torch.equal(packed_of(reference, spec).real_weight(), real)


@pytest.mark.parametrize(("variant", "groups"), [("b1", 1), ("b1", 5), ("b1.58", 1), ("b1.58", 2)])
@pytest.mark.parametrize("before", ["trained", "packed"])
def test_bit_linear_gives_the_same_bits(before: str, variant: str, groups: int) -> None:
    layer = BitLinear(100, 50, groups, bias=True, variant=variant)
    if before == "packed":
        layer.pack()
    x = torch.randn(3, 4, 100)
    expected, was_packed = layer(x), layer.is_packed
    packed = pack(layer)
    assert isinstance(packed, PackedLinear)
    assert torch.equal(packed(x), expected)
    assert layer.is_packed == was_packed, "the layer itself is left as it was"


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("quantized", [True, False])
def test_int8_linear_gives_the_same_numbers(quantized: bool, threshold: float) -> None:
    made = Int8Linear.quantized if quantized else Int8Linear.from_float
    layer, x = made(linear(), threshold), torch.randn(6, 96)
    x[2, 5], x[4, 7] = 30.0, -9.0
    packed = pack(layer)
    assert isinstance(packed, PackedLinear)
    expected = copy.deepcopy(layer).quantize_()(x)
    torch.testing.assert_close(packed(x), expected, rtol=1e-6, atol=1e-6)
    if threshold == 0:
        assert torch.equal(packed(x), expected), "integer sums are exact"
    assert layer.is_quantized is quantized


@every_spec
def test_memory_is_what_the_bits_say(spec: PackSpec) -> None:
    layer = linear(1024, 512)
    packed = packed_of(layer, spec)
    assert packed.words.nbytes == 1024 * 512 * spec.bits // 8
    scales = 512 * (1024 // spec.group if spec.table else 1) * (1 if spec.symmetric else 2)
    assert packed.nbytes == packed.words.nbytes + 4 * scales
    held = sum(value.nbytes for name, value in packed.state_dict().items() if name not in ("bias", "packed_format"))
    assert held == packed.nbytes
    assert not [name for name, _ in packed.named_parameters() if name != "bias"]


@every_spec
def test_state_dicts(spec: PackSpec) -> None:
    packed, x = packed_of(linear(), spec), torch.randn(4, 96)
    other = packed_of(linear(seed=1), spec)
    other.load_state_dict(copy.deepcopy(packed.state_dict()))
    assert torch.equal(other(x), packed(x))
    again = copy.deepcopy(packed)
    assert torch.equal(again(x), packed(x))


def test_foreign_state_dicts_are_named() -> None:
    packed = packed_of(linear(), PackSpec("int8"))
    before = copy.deepcopy(packed.state_dict())
    with pytest.raises(RuntimeError, match="this layer is packed and expects words and scale, got a plain weight"):
        packed.load_state_dict(linear().state_dict())
    with pytest.raises(RuntimeError, match=r"packed_format: expected PackSpec.*'int8'.*got PackSpec.*'llm_int8'"):
        packed.load_state_dict(packed_of(linear(), PackSpec("llm_int8")).state_dict())
    for content in (b"[1]", b"3", b'{"version": 1, "nme": 3}', b'{"version": 1, "name": "int7"}'):
        broken = {**before, "packed_format": torch.frombuffer(bytearray(content), dtype=torch.uint8)}
        with pytest.raises(RuntimeError, match="expected"):
            packed.load_state_dict(broken)
    for content, message in (
        (b'{"version": 99}', "expected version 1, got 99"),
        (b"\xff", "expected what fuse_pass.pack"),
    ):
        broken = {**before, "packed_format": torch.frombuffer(bytearray(content), dtype=torch.uint8)}
        with pytest.raises(RuntimeError, match=message):
            packed.load_state_dict(broken)
    assert all(torch.equal(value, before[name]) for name, value in packed.state_dict().items())
    with pytest.raises(RuntimeError, match="words"):
        linear().load_state_dict(before)


@every_spec
def test_dtypes_of_inputs(spec: PackSpec) -> None:
    packed, x = packed_of(linear(), spec), torch.randn(4, 96)
    wide = packed(x)
    for dtype in (torch.bfloat16, torch.float16):
        y = packed(x.to(dtype))
        assert y.dtype is dtype
        assert (y.float() - wide).norm() < 0.05 * wide.norm()
        half = copy.deepcopy(packed).to(dtype)
        assert half.scale.dtype is torch.float32
        assert torch.equal(half.words, packed.words)
    in_double = packed(x.double())
    assert in_double.dtype is torch.float64
    torch.testing.assert_close(in_double.float(), wide, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype is torch.bfloat16


@every_spec
def test_zeros_and_empty_batches(spec: PackSpec) -> None:
    layer = linear(64, 20)
    with torch.no_grad():
        layer.weight[3] = 0
    packed = packed_of(layer, spec)
    assert torch.isfinite(packed.real_weight()).all()
    assert torch.equal(packed(torch.zeros(2, 64)), layer.bias.detach().expand(2, 20))
    assert packed(torch.empty(0, 64)).shape == (0, 20)
    assert packed(torch.randn(64)).shape == (20,)
    assert packed(torch.randn(2, 3, 64)).shape == (2, 3, 20)


@every_spec
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_row(value: float, spec: PackSpec) -> None:
    packed, x = packed_of(linear(), spec), torch.randn(3, 96)
    x[1, 4] = value
    y = packed(x)
    assert not torch.isfinite(y[1]).any()
    if spec.kind != "b1":  # whose scale is that of the whole input
        assert torch.isfinite(y[[0, 2]]).all()


@every_spec
def test_gradients_of_inputs_and_bias(spec: PackSpec) -> None:
    packed, x = packed_of(linear(), spec), torch.randn(5, 96, requires_grad=True)
    grad = torch.randn(5, 50)
    packed(x).backward(grad)
    real = packed.real_weight()
    torch.testing.assert_close(x.grad, grad @ real, rtol=1e-4, atol=1e-5)
    assert packed.bias is not None
    torch.testing.assert_close(packed.bias.grad, grad.sum(0))


@pytest.mark.parametrize("name", ["int8_weight_only", "int4_weight_only"])
def test_second_derivatives(name: str) -> None:
    packed, x = packed_of(linear(64, 5), PackSpec(name)), torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(packed, (x,))


@every_spec
def test_under_transforms(spec: PackSpec) -> None:
    packed, x = packed_of(linear(), spec), torch.randn(3, 2, 96)
    assert torch.equal(torch.vmap(packed)(x), torch.stack([packed(one) for one in x]))
    gradient = torch.func.grad(lambda one: packed(one).sum())(x)
    torch.testing.assert_close(gradient, packed.real_weight().sum(0).expand(3, 2, 96), rtol=1e-4, atol=1e-5)
    jacobian = torch.func.jacrev(packed)(x[0, 0])
    torch.testing.assert_close(jacobian, packed.real_weight(), rtol=1e-4, atol=1e-5)


@every_spec
@pytest.mark.parametrize(("d_in", "d_out"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_sum_or_to_give(d_in: int, d_out: int, spec: PackSpec) -> None:
    layer = linear(max(d_in, 1), max(d_out, 1))
    layer.weight, layer.bias = nn.Parameter(torch.empty(d_out, d_in)), nn.Parameter(torch.ones(d_out))
    layer.in_features, layer.out_features = d_in, d_out
    packed = packed_of(layer, spec)
    assert torch.equal(packed(torch.randn(2, d_in)), torch.ones(2, d_out))
    assert packed.real_weight().shape == (d_out, d_in)


@pytest.mark.slow
@every_spec
def test_compiled(spec: PackSpec) -> None:
    model = nn.Sequential(nn.LayerNorm(96), linear(96, 130), nn.GELU(), linear(130, 40))
    packed = pack(model, spec)
    for backend in (fuse_pass.fuse_backend, "inductor"):
        for rows in (1, 6):
            x = torch.randn(rows, 96)
            torch.compiler.reset()
            with torch.no_grad():
                torch.testing.assert_close(torch.compile(packed, backend=backend)(x), packed(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int8", "int4_weight_only"])
def test_compiled_dynamically(name: str) -> None:
    packed = pack(nn.Sequential(linear(100, 130), nn.GELU(), linear(130, 40)), name)
    torch.compiler.reset()
    compiled = torch.compile(packed, backend=fuse_pass.fuse_backend, dynamic=True)
    with torch.no_grad():
        for rows in (2, 7, 33):
            x = torch.randn(rows, 100)
            torch.testing.assert_close(compiled(x), packed(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["inductor", "fuse_pass"])
@pytest.mark.parametrize("name", ["int8", "b1.58"])
def test_compiled_gradients(name: str, backend: str) -> None:
    """What a graph stores once for the products is an input of the graph here, and must not be kept as a result."""
    packed = pack(linear(64, 32), name)
    x, again = (torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    torch.compiler.reset()
    torch.compile(packed, backend=backend)(x).square().sum().backward()
    packed.bias.grad, of_bias = None, packed.bias.grad
    packed(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_bias, packed.bias.grad, rtol=1e-4, atol=1e-4)


@every_spec
def test_the_op_passes_opcheck(spec: PackSpec) -> None:
    packed = packed_of(linear(), spec)
    x = torch.randn(4, 96, requires_grad=True)
    arguments = (x, *packed._weight(), packed.bias, spec.threshold)
    torch.library.opcheck(torch.ops.fuse_pass.packed_dense.default, arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack(linear(), "int7"), ValueError, "expected one of 'int8', .* got 'int7'"),
        (lambda: pack(linear(), 8), TypeError, "expected a fuse_pass.PackSpec or one of .* got 8"),
        (lambda: pack("model", "int8"), TypeError, "expected a torch.nn.Module, got str"),
        (lambda: unpack(3), TypeError, "expected a torch.nn.Module, got int"),
        (lambda: pack(linear(), "int8", include="x"), ValueError, "pack: no module's name matches 'x'"),
        (lambda: pack(linear(), "int8", exclude=[3]), TypeError, "pack: exclude: expected names or patterns, got 3"),
        (lambda: PackSpec("nf4", group=48), ValueError, "group: expected one of 32, 64, 128, got 48"),
        (lambda: PackSpec("llm_int8", threshold=-1.0), ValueError, "threshold: expected a number ≥ 0, got -1.0"),
        (
            lambda: packed_of(linear(), PackSpec("int8"))(torch.randn(2, 95)),
            RuntimeError,
            "shapes cannot be multiplied",
        ),
        (
            lambda: packed_of(linear(), PackSpec("int8"))(torch.ones(2, 96, dtype=torch.long)),
            RuntimeError,
            "same dtype",
        ),
        (lambda: packed_of(linear(few_bits.MAX_INNER + 1, 1), PackSpec("int8")), ValueError, "exactly in int32"),
    ],
)
def test_mistakes_are_explained(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_spec
def test_no_code_stands_for_a_weight_that_is_not_finite(spec: PackSpec, value: float) -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[1, 2] = value
    with pytest.raises(ValueError, match="expected a finite weight, got one with NaN or infinity"):
        pack(layer, spec)


@every_spec
def test_on_meta(spec: PackSpec) -> None:
    packed = packed_of(linear().to("meta"), spec)
    assert packed.words.is_meta
    assert packed(torch.randn(2, 96, device="meta")).shape == (2, 50)


@pytest.mark.skipif(cpp_compiler() is None, reason="there is no C++ compiler")
def test_only_outlier_columns_are_multiplied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without outliers there is no product in floating point at all."""
    packed, x = packed_of(linear(), PackSpec("llm_int8")), torch.randn(4, 96).clamp(-3, 3)
    asked: list[int] = []
    real = few_bits.columns_of_inner
    monkeypatch.setattr(
        few_bits, "columns_of_inner", lambda words, which, n: asked.append(len(which)) or real(words, which, n)
    )
    packed(x)
    assert not asked
    x[1, 3] = x[0, 70] = 9.0
    packed(x)
    assert asked == [2]
