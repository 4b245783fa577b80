"""Converted Linear layers, packed: what was simulated is what is deployed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_pass
from fuse_pass import Granularity, IntFormat, QuantSpec, Site, calibrate, convert, pack, unpack
from fuse_pass.kernels import few_bits
from fuse_pass.nn import PackedQuantizedLinear, QuantizedLinear
from fuse_pass.ops import quantized_dense
from fuse_pass.ops.quantized_dense import IntegerWeight, QuantizedDense

pytestmark = pytest.mark.processor
ROW, TOKEN, GROUP = Granularity("channel", axis=0), Granularity("token"), Granularity("group", size=32)
INT4, INT2 = IntFormat(4), IntFormat(2)
SPECS: dict[str, QuantSpec] = {
    "int8": QuantSpec.uniform("int8"),
    "int4": QuantSpec.uniform("int4"),
    "int8, per token": QuantSpec(input=Site("int8", granularity=TOKEN), weight=Site("int8", granularity=ROW)),
    "static": QuantSpec(input=Site("int8", scale="static"), weight=Site("int8", granularity=ROW)),
    "learned": QuantSpec(input=Site("int8", scale="learned"), weight=Site(INT4, scale="learned")),
    "asymmetric input": QuantSpec(input=Site("int8_asymmetric", scale="static"), weight="int8"),
    "asymmetric input per token": QuantSpec(input=Site("int8_asymmetric", granularity=TOKEN), weight="int8"),
    "asymmetric both": QuantSpec(input="int8_asymmetric", weight=Site("int8_asymmetric", granularity=ROW)),
    "asymmetric int4 weight": QuantSpec(input="int8", weight=Site(IntFormat(4, symmetric=False), granularity=ROW)),
    "ternary weight": QuantSpec(input="int8", weight=Site(INT2, granularity=ROW)),
    "int6 and int3": QuantSpec(input=IntFormat(6), weight=Site(IntFormat(3), granularity=ROW)),
    "every site": QuantSpec("int8", Site("int8", granularity=ROW), "int8", "int8_asymmetric", None, "int8"),
    "static output": QuantSpec(input="int8", weight="int8", output=Site("int8", scale="static")),
    "float output": QuantSpec(input="int8", weight="int8", bias="fp8_e4m3", output="fp8_e4m3"),
    "towards zero": QuantSpec("int8", "int8", rounding="towards_zero"),
    "weight only": QuantSpec(weight=Site("int8", granularity=ROW)),
    "weight only, asymmetric": QuantSpec(weight=Site("int8_asymmetric", granularity=ROW)),
    "weight only, int4 by groups": QuantSpec(weight=Site(INT4, granularity=GROUP)),
    "weight only, asymmetric int4 by groups": QuantSpec(
        weight=Site(IntFormat(4, symmetric=False), granularity=GROUP), output="fp8_e4m3"
    ),
    "weight only, int8 by groups": QuantSpec(weight=Site("int8", granularity=GROUP)),
    "weight only, one scale": QuantSpec(weight="int4"),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def converted(
    spec: QuantSpec, d_in: int = 96, d_out: int = 50, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> QuantizedLinear:
    """Calibrated, with some of the inputs beyond the range."""
    torch.manual_seed(0)
    layer = convert(nn.Linear(d_in, d_out, bias=bias, dtype=dtype), spec)
    assert isinstance(layer, QuantizedLinear)
    calibrate(nn.Sequential(layer), [(0.6 * inputs(20, d_in, seed=2).to(dtype),)])
    return layer


def packed_of(layer: QuantizedLinear) -> PackedQuantizedLinear:
    found = pack(layer)
    assert isinstance(found, PackedQuantizedLinear)
    return found


def assert_same_up_to_sums(ours: Tensor, layer: QuantizedLinear, x: Tensor) -> None:
    """By the bound in the docstring; an output site may take the next number for what lies between two."""
    spec = layer.spec
    simulated = copy.deepcopy(layer)
    simulated.spec = QuantSpec(input=spec.input, weight=spec.weight, bias=spec.bias)
    bare = packed_of(simulated)(x).double()
    exact = simulated(x).double()
    magnitudes = simulated._input(x).double().abs() @ simulated._weight(layer.weight).double().abs().t() + 1
    bound = (layer.in_features + 8) * torch.finfo(torch.float32).eps * magnitudes
    assert ((bare - exact).abs() <= bound).all()
    expected = layer(x)
    if spec.output is None:
        assert torch.equal(ours.double(), bare)
    else:
        differing = (ours - expected).abs() > bound
        assert differing.float().mean() < 0.02
        assert (ours - expected).abs().max() <= 0.13 * expected.abs().max()


@every_spec
@pytest.mark.parametrize("shape", [(5, 96), (1, 96), (96,), (2, 3, 96), (300, 96)], ids=str)
def test_same_as_the_simulation(shape: tuple[int, ...], spec: QuantSpec) -> None:
    layer, x = converted(spec), inputs(*shape)
    y = packed_of(layer)(x)
    assert y.shape == (*shape[:-1], 50)
    assert_same_up_to_sums(y, layer, x)


@pytest.mark.parametrize("name", ["int8", "asymmetric both", "int6 and int3", "weight only", "weight only, one scale"])
@pytest.mark.parametrize(("d_in", "d_out"), [(100, 17), (7, 3), (1, 1), (33, 64)])
def test_odd_sizes(d_in: int, d_out: int, name: str) -> None:
    layer, x = converted(SPECS[name], d_in, d_out, bias=False), inputs(4, d_in)
    assert_same_up_to_sums(packed_of(layer)(x), layer, x)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.output is None and spec.input])
def test_float64_agrees_to_its_own_rounding(name: str) -> None:
    """Where no output is rounded, nor real numbers are summed with scales in float32."""
    spec = SPECS[name]
    layer, x = converted(spec, dtype=torch.float64), inputs(5, 96).double()
    torch.testing.assert_close(packed_of(layer)(x), layer(x), rtol=1e-12, atol=1e-12)


@every_spec
def test_the_weight_is_the_simulated_one_in_as_few_bits(spec: QuantSpec) -> None:
    layer = converted(spec, 256, 64)
    packed = packed_of(layer)
    torch.testing.assert_close(packed.real_weight(), layer._weight(layer.weight).detach(), rtol=1e-6, atol=1e-7)
    bits = spec.weight.format.bits
    width = 8 if bits > 4 else 4 if bits > 2 or spec.input is None else 2
    assert packed.words.nbytes == 256 * 64 * width // 8
    assert not [name for name, _ in packed.named_parameters() if name != "bias"]


@every_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, spec: QuantSpec) -> None:
    layer, x = converted(spec), inputs(5, 96)
    packed = packed_of(layer)
    y = packed(x.to(dtype))
    assert y.dtype is dtype
    wide = packed(x.to(dtype).float())
    assert (y.float() - wide).norm() < 0.03 * wide.norm()
    half = copy.deepcopy(packed).to(dtype)
    assert half.scale.dtype is torch.float32
    assert (half(x.to(dtype)).float() - wide).norm() < 0.03 * wide.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype is torch.bfloat16


@every_spec
def test_gradients_are_those_of_the_simulation(spec: QuantSpec) -> None:
    layer = converted(spec)
    packed = packed_of(layer)
    x = inputs(5, 96) * 2
    grads = []
    for module in (packed, layer):
        leaf = x.clone().requires_grad_()
        module(leaf).backward(inputs(5, 50, seed=3))
        assert module.bias.grad is not None
        grads.append((leaf.grad, module.bias.grad))
        module.bias.grad = None
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@every_spec
def test_second_derivatives(spec: QuantSpec) -> None:
    """The gradient of x is linear in that of y: its derivative is Ŵ, where x is not clipped."""
    layer = converted(QuantSpec(input=spec.input, weight=spec.weight))
    packed, x = packed_of(layer), (0.1 * inputs(3, 96)).requires_grad_()
    grad = inputs(3, 50, seed=4).requires_grad_()
    (of_x,) = torch.autograd.grad(packed(x), x, grad, create_graph=True)
    direction = inputs(3, 96, seed=5)
    (found,) = torch.autograd.grad(of_x, grad, direction)
    torch.testing.assert_close(found, direction @ packed.real_weight().t(), rtol=1e-4, atol=1e-5)


@every_spec
def test_state_dicts(spec: QuantSpec) -> None:
    packed, x = packed_of(converted(spec)), inputs(4, 96)
    other = packed_of(converted(spec))
    for buffer in other.buffers():
        buffer.zero_() if buffer is not other.packed_format and buffer is not other.table else None
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), packed(x))
    on_meta = packed_of(converted(spec)).to("meta")
    on_meta.load_state_dict(packed.state_dict(), assign=True)
    if on_meta.table is None:
        assert torch.equal(on_meta(x), packed(x))


def test_foreign_state_dicts_are_named() -> None:
    packed = packed_of(converted(SPECS["int8"]))
    for other, message in (
        (packed_of(converted(SPECS["int4"])), "expected QuantSpec.*got QuantSpec"),
        (pack(nn.Linear(96, 50), "int8"), "expected that of a packed Quantized layer"),
        (nn.Linear(96, 50), "this layer is packed"),
    ):
        with pytest.raises(RuntimeError, match=message):
            packed.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"expected what fuse_pass\.pack writes"):
        pack(nn.Linear(96, 50), "int8").load_state_dict(packed.state_dict())
    newer = torch.frombuffer(bytearray(b'{"version": 9, "quantized": ""}'), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="expected version 1, got 9"):
        packed.load_state_dict({**packed.state_dict(), "packed_format": newer})


@every_spec
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_what_it_does_in_the_simulation(value: float, spec: QuantSpec) -> None:
    layer, x = converted(spec), inputs(3, 96)
    x[1, 4] = value
    ours, theirs = packed_of(layer)(x), layer(x)
    assert torch.equal(ours.isnan(), theirs.isnan())
    if spec.output is None:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


@every_spec
def test_zeros_and_empty_batches(spec: QuantSpec) -> None:
    layer = converted(spec)
    with torch.no_grad():
        layer.weight[3] = 0
    packed = packed_of(layer)
    assert packed(torch.empty(0, 96)).shape == (0, 50)
    x = torch.zeros(2, 96)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.grad is None])
def test_under_transforms(name: str) -> None:
    """Rounded gradients are refused by torch.func in every quantised layer."""
    spec = SPECS[name]
    packed, x = packed_of(converted(spec)), inputs(3, 2, 96)
    expected = torch.stack([packed(one) for one in x])
    assert torch.equal(torch.vmap(packed)(x), expected)


@every_spec
def test_on_meta_and_as_a_copy(spec: QuantSpec) -> None:
    packed, x = packed_of(converted(spec)), inputs(2, 96)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    assert packed_of(converted(spec).to("meta"))(x.to("meta")).shape == (2, 50)


@pytest.mark.parametrize(
    "name", ["int8", "static", pytest.param("asymmetric both", marks=pytest.mark.slow), "weight only, int4 by groups"]
)
def test_compiled(name: str) -> None:
    model = convert(nn.Sequential(nn.Linear(96, 130), nn.GELU(), nn.Linear(130, 64)), SPECS[name], exclude="1")
    calibrate(model, [(inputs(20, 96),)])
    packed = pack(model)
    assert sum(isinstance(layer, PackedQuantizedLinear) for layer in packed) >= 1
    torch.compiler.reset()
    compiled = torch.compile(packed, backend=fuse_pass.fuse_backend, dynamic=True)
    with torch.no_grad():
        for rows in (2, 7):
            x = inputs(rows, 96)
            torch.testing.assert_close(compiled(x), packed(x), rtol=1e-4, atol=1e-4)


def test_the_op_passes_opcheck() -> None:
    packed = packed_of(converted(SPECS["asymmetric both"]))
    x = inputs(4, 96).requires_grad_()
    how = (-128, 127, "nearest", True)
    zero = torch.tensor(3.0)
    arguments = (x, torch.tensor(0.01), zero, *packed._weight(), packed.bias, *how)
    torch.library.opcheck(torch.ops.fuse_pass.quantized_dense.default, arguments)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("has_zero_point", [True, False])
def test_sums_at_the_extremes_are_exact(has_zero_point: bool, bits: int) -> None:
    """Codes and integers at both ends, at the largest inner size, against int64."""
    inner = quantized_dense.max_inner(bits, has_zero_point=has_zero_point)
    inner = min(inner, few_bits.MAX_INNER)
    codes = torch.stack([torch.full((inner,), end) for end in (0, 2**bits - 1)]).to(torch.uint8)
    low, high = -128, 127
    for zero in (0, 2 ** (bits - 1), 2**bits - 1):
        of_columns = torch.full((2,), zero, dtype=torch.int32)
        sums = (codes.long().sum(1) - inner * zero).to(torch.int32)
        weight = IntegerWeight(few_bits.pack(codes, bits), torch.ones(2).double(), of_columns, sums, bits, 2)
        x = torch.tensor([[low], [high]], dtype=torch.float64).expand(2, inner)
        for x_zero in (low, 5, high) if has_zero_point else (None,):
            given = None if x_zero is None else torch.tensor(float(x_zero)).double()
            moved = x if x_zero is None else x - x_zero
            how = quantized_dense.InputRounding(low, high, "nearest", False)
            y = QuantizedDense(moved, torch.ones(()).double(), given, weight, None, how).forward()
            exact = (x.long() - (x_zero or 0)) @ (codes.long() - zero).t()
            assert torch.equal(y, exact.double()), (zero, x_zero)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_no_call_of_a_kernel_of_the_cpu_is_left(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the open, as on a GPU, the sums are the same."""
    codes = torch.randint(0, 2**bits, (24, 37), dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (24,), dtype=torch.int32)
    sums = (codes.int() - zero[:, None]).sum(1, dtype=torch.int32)
    weight = IntegerWeight(few_bits.pack(codes, bits), torch.ones(24), zero, sums, bits, 24)
    a = torch.randint(-128, 128, (3, 37), dtype=torch.int8)
    assert torch.equal(weight.centred_sums(a), a.int() @ (codes.int() - zero[:, None]).t())
    on_meta = IntegerWeight(*(part.to("meta") for part in (weight.words, weight.scale, zero, sums)), bits, 24)
    monkeypatch.setattr(quantized_dense, "integer_product", None)
    assert on_meta.centred_sums(a.to("meta")).shape == (3, 24)


DECLINED: dict[str, tuple[QuantSpec, str]] = {
    "no weight": (QuantSpec(input="int8"), "its weight is not quantised"),
    "fp8": (QuantSpec.uniform("fp8_e4m3"), "weights of fp8_e4m3 are no integers of 2 to 8 bits"),
    "int16": (QuantSpec.uniform(IntFormat(16)), "weights of int16 are no integers of 2 to 8 bits"),
    "fp8 input": (QuantSpec(input="fp8_e4m3", weight="int8"), "inputs of fp8_e4m3 are no integers of 2 to 8 bits"),
    "by column": (
        QuantSpec(weight=Site("int8", granularity=Granularity("channel", axis=1))),
        "its weight is scaled by channel, and not by row",
    ),
    "groups and an input": (QuantSpec(input="int8", weight=Site("int8", granularity=GROUP)), "groups that have scales"),
    "groups that do not divide": (
        QuantSpec(weight=Site("int4", granularity=Granularity("group", size=40))),
        "groups of 40 do not divide 96 inputs",
    ),
    "input by group": (QuantSpec(input=Site("int8", granularity=GROUP), weight="int8"), "its input is scaled by group"),
    "random weight": (QuantSpec(weight=Site("int8", rounding="stoc_prop")), "rounded at random in every call"),
    "random input": (QuantSpec(Site("int8", rounding="stoc_prop"), "int8"), "its input is rounded at random"),
    "random bias": (QuantSpec("int8", "int8", Site("int8", rounding="stoc_prop")), "its bias is rounded at random"),
    "not calibrated": (QuantSpec(Site("int8", scale="static"), "int8"), "call fuse_pass.calibrate first"),
}


@pytest.mark.parametrize(("spec", "detail"), DECLINED.values(), ids=DECLINED)
def test_what_cannot_be_packed_stays_simulated_and_is_named(spec: QuantSpec, detail: str) -> None:
    model = convert(nn.Sequential(nn.Linear(96, 50)), spec)
    with fuse_pass.collect() as report:
        packed = pack(model)
    assert isinstance(packed[0], QuantizedLinear)
    assert [decline.where for decline in report.declines] == ["0"]
    assert detail in report.declines[0].detail


@pytest.mark.parametrize(("d_in", "d_out"), [(0, 5), (5, 0), (0, 0)])
def test_empty_weights_stay_simulated(d_in: int, d_out: int) -> None:
    layer = convert(nn.Linear(d_in, d_out), "int8")
    with fuse_pass.collect() as report:
        assert pack(layer)(inputs(2, d_in)).shape == (2, d_out)
    assert [decline.detail for decline in report.declines] == ["its weight is empty, and has no scale"]


def test_inner_sizes_beyond_exact_sums_are_declined() -> None:
    largest = quantized_dense.max_inner(8, has_zero_point=True)
    layer = convert(nn.Linear(largest + 1, 1), SPECS["asymmetric both"])
    with fuse_pass.collect() as report:
        assert pack(layer) is not None
    assert "summed exactly in int32" in report.declines[0].detail


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(96, 128), nn.LayerNorm(128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.relu(self.norm(self.first(x))))


def test_a_whole_calibrated_model() -> None:
    simulated = convert(Model(), QuantSpec(input=Site("int8", scale="static"), weight=Site("int8", granularity=ROW)))
    calibrate(simulated, [(inputs(64, 96),)])
    with fuse_pass.collect() as report:
        packed = pack(simulated)
    assert sorted(match.where for match in report.matches) == ["first", "second"]
    assert [decline.where for decline in report.declines] == ["norm"]
    x = inputs(9, 96)
    torch.testing.assert_close(packed(x), simulated(x), rtol=1e-4, atol=1e-3)
    back = unpack(packed)
    assert type(back.first) is nn.Linear
    torch.testing.assert_close(back.first.weight, simulated.first._weight(simulated.first.weight))
    assert isinstance(pack(simulated, exclude="first").first, QuantizedLinear)
    with fuse_pass.collect() as report:
        assert pack(packed).first is not None
    assert {decline.detail for decline in report.declines} >= {"is packed already"}
