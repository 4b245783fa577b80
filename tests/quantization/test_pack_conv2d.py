"""Packed convolutions: those in floating point, and those that were converted."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuse_pass
from fuse_pass import Granularity, IntFormat, PackSpec, QuantSpec, Site, calibrate, convert, pack, unpack
from fuse_pass.nn import PackedConv2d, PackedQuantizedConv2d, QuantizedConv2d
from fuse_pass.ops.quantized_conv2d import max_grouped_inner, quantized_conv2d_op
from fuse_pass.quantization.layers.packed_conv2d import INT8_SPEC

pytestmark = pytest.mark.processor
IMAGE = Granularity("channel", axis=0)
GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1, "bias": False},
    "1x1, every other": {"kernel_size": 1, "stride": 2},
    "uneven": {"kernel_size": (2, 5), "stride": (3, 2), "padding": (0, 3), "dilation": (2, 1)},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "grouped": {"kernel_size": 3, "groups": 4, "stride": 2, "padding": 1},
    "depthwise": {"kernel_size": 5, "groups": 8, "padding": "same", "bias": False},
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
SPECS: dict[str, QuantSpec] = {
    "of images": INT8_SPEC,
    "int8": QuantSpec.uniform("int8"),
    "static": QuantSpec(input=Site("int8", scale="static"), weight=Site("int8", granularity=IMAGE)),
    "asymmetric, static": QuantSpec(
        input=Site("int8_asymmetric", scale="static"), weight=Site(IntFormat(4, symmetric=False), granularity=IMAGE)
    ),
    "asymmetric, of images": QuantSpec(input=Site("int8_asymmetric", granularity=IMAGE), weight="int8_asymmetric"),
    "every site": QuantSpec("int4", IntFormat(2), "int8", "fp8_e4m3"),
    "weight only": QuantSpec(weight=Site("int4", granularity=IMAGE)),
    "weight only, asymmetric": QuantSpec(weight=Site("int8_asymmetric", granularity=IMAGE), output="bf16"),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def conv(seed: int = 0, dtype: torch.dtype = torch.float32, **geometry: Any) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(8, 16, **geometry, dtype=dtype)


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 8, 13, 11)), generator=torch.Generator().manual_seed(1)) + 0.2


def converted(spec: QuantSpec, geometry: dict[str, Any], dtype: torch.dtype = torch.float32) -> QuantizedConv2d:
    """Calibrated, with some of the inputs beyond the range."""
    layer = convert(conv(dtype=dtype, **geometry), spec)
    assert isinstance(layer, QuantizedConv2d)
    if spec is not INT8_SPEC:  # whose scales come from the images
        calibrate(nn.Sequential(layer), [(0.6 * images().to(dtype),)], progress=False)
    return layer


def packed_of(layer: QuantizedConv2d) -> PackedQuantizedConv2d:
    found = pack(layer)
    assert isinstance(found, PackedQuantizedConv2d)
    return found


def bound(layer: QuantizedConv2d, x: Tensor) -> Tensor:
    """As that of a packed Linear: the roundings of a sum, relative to the sum of the magnitudes."""
    with torch.no_grad():
        wide = copy.deepcopy(layer).double()
        wide.spec = QuantSpec()
        wide.weight.copy_(layer._weight(layer.weight).double().abs())
        wide.bias = None
        magnitudes = wide(layer._input(x).double().abs()) + 1
    return (layer.weight[0].numel() + 8) * torch.finfo(torch.float32).eps * magnitudes


@every_spec
@every_geometry
def test_same_as_the_simulation(geometry: dict[str, Any], spec: QuantSpec) -> None:
    layer, x = converted(spec, geometry), images()
    bare = copy.deepcopy(layer)
    bare.spec = QuantSpec(input=spec.input, weight=spec.weight, bias=spec.bias)
    ours, theirs = packed_of(bare)(x), bare(x)
    assert ours.shape == theirs.shape
    assert ((ours.double() - theirs.double()).abs() <= bound(bare, x)).all()
    if spec.output is not None:  # what lies between two numbers may go to either
        assert torch.equal(packed_of(layer)(x), layer._output(ours))


@every_geometry
def test_int8_of_a_float_layer_is_near_it(geometry: dict[str, Any]) -> None:
    layer, x = conv(**geometry), images()
    packed = pack(layer, "int8")
    assert isinstance(packed, PackedQuantizedConv2d)
    assert (packed(x) - layer(x)).norm() < 0.02 * layer(x).norm()
    # One image does not depend on the others.
    assert torch.equal(packed(x)[1:2], packed(x[1:2].contiguous()))
    assert torch.equal(packed(x)[1], packed(x[1]))


@every_geometry
@pytest.mark.parametrize("name", ["int8_weight_only", "int4_weight_only", "nf4", "fp4"])
def test_weights_alone(name: str, geometry: dict[str, Any]) -> None:
    layer, x = conv(**geometry), images()
    packed = pack(layer, PackSpec(name, group=32))
    assert isinstance(packed, PackedConv2d)
    assert torch.equal(packed(x), packed.to_float()(x))
    rows = layer.weight.detach().permute(0, 2, 3, 1).flatten(1)
    linear = nn.Linear(*reversed(rows.shape), bias=False)
    linear.weight = nn.Parameter(rows)
    of_linear = pack(linear, PackSpec(name, group=32)).real_weight()
    assert torch.equal(packed.real_weight().permute(0, 2, 3, 1).flatten(1), of_linear)
    assert (packed(x) - layer(x)).norm() < (0.2 if packed.spec.bits == 4 else 0.01) * layer(x).norm()


def test_memory_is_what_the_bits_say() -> None:
    layer = nn.Conv2d(64, 128, 3)
    for name, spare in (("int8", 12), ("int8_weight_only", 4)):
        packed = pack(layer, name)
        assert packed.nbytes == 64 * 128 * 9 + spare * 128, name
        assert packed.nbytes < 1.05 * layer.weight.numel()
    assert pack(layer, "int4_weight_only").nbytes == 64 * 128 * 9 // 2 + 4 * 128 * 9


@pytest.mark.parametrize("bits", [8, 4])
def test_sums_at_the_extremes_are_exact(bits: int) -> None:
    """The largest integers of both operands, with and without groups, against int64."""
    fmt = IntFormat(bits, symmetric=False)
    site = Site(IntFormat(8, symmetric=False), scale="static")
    for groups in (1, 2):
        inner = 1024 if groups == 1 else 128
        layer = convert(nn.Conv2d(inner * groups, 4, 1, groups=groups, bias=False), QuantSpec(site, Site(fmt)))
        assert isinstance(layer, QuantizedConv2d)
        layer.set_scale("input", torch.tensor(1.0), torch.tensor(-128.0))
        with torch.no_grad():
            layer.weight.copy_(torch.where(torch.arange(inner) % 3 == 0, 0.0, float(2**bits - 1)).view(1, -1, 1, 1))
        x = torch.full((1, inner * groups, 2, 2), 255.0)
        exact = (layer._weight(layer.weight).double() * 255).sum((1, 2, 3))
        assert torch.equal(packed_of(layer)(x)[0, :, 0, 0].double(), exact.float().double())


def test_groups_beyond_exact_sums_stay_simulated() -> None:
    inner = max_grouped_inner(8, has_zero_point=False) + 1
    with fuse_pass.collect() as report:
        packed = pack(nn.Conv2d(2 * inner, 2, 1, groups=2), "int8")
    assert type(packed) is nn.Conv2d
    assert [decline.detail for decline in report.declines] == [
        f"at most {inner - 1} products are summed exactly in a group, not {inner}"
    ]
    assert isinstance(pack(nn.Conv2d(2 * inner - 2, 2, 1, groups=2), "int8"), PackedQuantizedConv2d)


@every_geometry
@pytest.mark.parametrize("name", ["static", "asymmetric, of images", "weight only"])
def test_gradients_are_those_of_the_simulation(name: str, geometry: dict[str, Any]) -> None:
    layer = converted(SPECS[name], geometry, torch.float64)
    packed = packed_of(layer)
    x, again = (images().double().requires_grad_() for _ in range(2))
    y, simulated = packed(x), layer(again)
    weights = torch.randn_like(y)
    expected = torch.autograd.grad(simulated, [again, *([] if layer.bias is None else [layer.bias])], weights)
    found = torch.autograd.grad(y, [x, *([] if packed.bias is None else [packed.bias])], weights)
    scale = getattr(layer, "input_scale", None)
    for ours, theirs in zip(found, expected, strict=True):
        if name == "asymmetric, of images" and ours.dim() == 4:
            continue  # there the simulation gives the scale, which comes from x, no gradient, and clips nothing
        of_scales = 1e-6 if name == "weight only" else 1e-10  # which are float32 there
        torch.testing.assert_close(ours, theirs, rtol=of_scales, atol=of_scales)
    assert (scale is not None) == (name == "static")


def test_second_derivatives() -> None:
    packed = packed_of(converted(SPECS["static"], GEOMETRIES["uneven"], torch.float64))
    x = images(1, 8, 7, 5).double().requires_grad_()
    (first,) = torch.autograd.grad(packed(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    real = packed.to_float().double()
    ones = torch.ones_like(x)
    product = torch.nn.functional.conv2d(ones, real.weight, None, real.stride, real.padding, real.dilation)
    (expected,) = torch.autograd.grad(real(x), x, 2 * product)
    torch.testing.assert_close(second, expected)


@every_spec
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_what_it_does_in_the_simulation(value: float, spec: QuantSpec) -> None:
    layer, x = converted(spec, GEOMETRIES["3x3"]), images()
    x[1, 3, 4, 5] = value
    ours, theirs = packed_of(layer)(x), layer(x)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours[0].isfinite().all() or theirs[0].isnan().any()


@pytest.mark.parametrize("name", ["uneven", "grouped"])
def test_memory_formats_and_compilation(name: str) -> None:
    geometry = GEOMETRIES[name]
    for packed in (pack(conv(**geometry), "int8"), packed_of(converted(SPECS["asymmetric, static"], geometry))):
        for fmt in (torch.contiguous_format, torch.channels_last):
            x = images().contiguous(memory_format=fmt)
            torch.compiler.reset()
            compiled = torch.compile(packed, backend=fuse_pass.fuse_backend, fullgraph=True)
            y, of_compiled = packed(x), compiled(x)
            assert y.is_contiguous(memory_format=fmt)
            assert of_compiled.stride() == y.stride()
            torch.testing.assert_close(of_compiled, y, rtol=1e-5, atol=1e-5)


def test_dynamic_shapes() -> None:
    packed = pack(conv(kernel_size=3, stride=2, padding=1), "int8")
    compiled = torch.compile(packed, backend=fuse_pass.fuse_backend, fullgraph=True, dynamic=True)
    for size in ((3, 8, 13, 11), (2, 8, 16, 9), (5, 8, 7, 30)):
        torch.testing.assert_close(compiled(images(*size)), packed(images(*size)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    layer, x = conv(kernel_size=3), images()
    for name in ("int8", "int4_weight_only"):
        packed = pack(layer, name).to(dtype)
        assert packed.scale.dtype is torch.float32
        y = packed(x.to(dtype))
        assert y.dtype is dtype
        assert (y.double() - layer(x).double()).norm() < 0.15 * layer(x).norm()
        assert packed.to_float().weight.dtype is dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert pack(layer, "int8")(x).dtype is torch.bfloat16


@every_spec
def test_state_dicts_copies_and_meta(spec: QuantSpec) -> None:
    layer, x = converted(spec, GEOMETRIES["3x3"]), images()
    packed, other = packed_of(layer), packed_of(converted(spec, GEOMETRIES["3x3"]))
    other.words.zero_()
    other.load_state_dict(packed.state_dict())
    for twin in (other, copy.deepcopy(packed)):
        assert torch.equal(twin(x), packed(x))
    with pytest.raises(RuntimeError, match="this layer is packed and expects words and scale, got a plain weight"):
        packed.load_state_dict(conv(kernel_size=3).state_dict())
    assert packed.to("meta")(x.to("meta")).shape == layer(x).shape
    assert packed_of(layer)(images()[:0]).shape == (0, *layer(x).shape[1:])


@every_geometry
def test_unpacked(geometry: dict[str, Any]) -> None:
    layer = conv(**geometry).eval()
    packed = pack(nn.Sequential(layer), "int8")
    back = unpack(packed)[0]
    assert type(back) is nn.Conv2d
    assert not back.training
    assert back.bias is packed[0].bias or back.bias is not None
    assert repr(back) == repr(layer)
    assert torch.equal(back.weight, packed[0].real_weight())
    assert (back.weight - layer.weight).abs().max() < layer.weight.abs().max() / 127


def test_under_transforms() -> None:
    packed, x = packed_of(converted(SPECS["static"], GEOMETRIES["3x3"])), images(4, 2, 8, 6, 6)
    with pytest.warns(UserWarning, match="performance drop"):
        together = torch.func.vmap(packed)(x)
    torch.testing.assert_close(together, torch.stack([packed(part) for part in x]))


def test_the_op_passes_opcheck() -> None:
    for geometry in (GEOMETRIES["uneven"], GEOMETRIES["grouped"]):
        packed = packed_of(converted(SPECS["asymmetric, static"], geometry))
        x = images().requires_grad_()
        scale, zero, how = packed._input_qparams(x)
        windows = packed.windows.arguments()
        arguments = (x, scale, zero, *packed._weight(), packed.bias, *how, *windows)
        torch.library.opcheck(quantized_conv2d_op, arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 7, 9, 9), r"expected a floating-point x \[N, 8, H, W\]"),
        (torch.randn(8, 9), "got torch.float32"),
        (torch.ones(2, 8, 9, 9, dtype=torch.int64), "got torch.int64"),
        (torch.randn(2, 8, 9, 9, device="meta"), "on cpu, got torch.float32 .* on meta"),
    ],
)
def test_wrong_inputs(x: Tensor, message: str) -> None:
    for name in ("int8", "nf4"):
        with pytest.raises(RuntimeError, match=message):
            pack(conv(kernel_size=3), name)(x)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_images_smaller_than_the_window_are_refused(name: str, groups: int) -> None:
    for layer in (conv(kernel_size=5, groups=groups), pack(conv(kernel_size=5, groups=groups), name)):
        with pytest.raises(RuntimeError, match=r"[Kk]ernel size|too small"):
            layer(images(1, 8, 3, 9))


@pytest.mark.parametrize(
    ("spec", "detail"),
    [
        (
            QuantSpec(input=Site("int8", granularity=Granularity("token")), weight="int8"),
            "its input is scaled by token",
        ),
        (QuantSpec(input="int8", weight=Site("int8", granularity=Granularity("channel", axis=1))), "scaled by channel"),
        (QuantSpec("fp8_e4m3", "fp8_e4m3"), "weights of fp8_e4m3 are no integers of 2 to 8 bits"),
        (QuantSpec(input=Site("int8", scale="static"), weight="int8"), "has no value yet"),
    ],
)
def test_what_cannot_be_packed_stays_simulated_and_is_named(spec: QuantSpec, detail: str) -> None:
    with fuse_pass.collect() as report:
        packed = pack(nn.Sequential(convert(conv(kernel_size=3), spec)))
    assert type(packed[0]) is QuantizedConv2d
    assert detail in report.declines[0].detail


@pytest.mark.parametrize("name", ["b1", "b1.58", "llm_int8"])
def test_specs_of_rows_are_declined(name: str) -> None:
    with fuse_pass.collect() as report:
        assert type(pack(conv(kernel_size=3), name)) is nn.Conv2d
    assert [decline.detail for decline in report.declines] == [f"a Conv2d has no packed layer of {name}"]
