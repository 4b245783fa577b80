"""Calibration: static scales where they are unambiguous, and everything that carries them."""

from __future__ import annotations

import builtins
import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_pass
from fuse_pass import convert
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.quantization.calibrate import calibrate
from fuse_pass.quantization.functional import fake_quantize
from fuse_pass.quantization.layers import LAYER_FOR, QuantizedLayer
from fuse_pass.quantization.observers import OBSERVERS, MovingAverage, Percentile
from tests.calibration import Wired, data, network, scales_of
from tests.quantization.samples import SAMPLES, Sample

STATIC = QuantSpec(input=Site("int8", scale="static"), weight="int8")
PER_CHANNEL = Site("int8", granularity=fuse_pass.Granularity("channel", axis=0))
EVERY_SITE = QuantSpec("int8", "int8", "int8", "int8_asymmetric", "int8")
COMPILED = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.MultiheadAttention, nn.GRU, nn.Embedding, nn.ReLU)
every_layer = pytest.mark.parametrize(
    "sample", {s.type: s for s in reversed(SAMPLES)}.values(), ids=lambda sample: sample.type.__name__
)


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result or () for t in tensors_of(part)]


@every_layer
def test_static_is_dynamic_on_the_calibration_batch(sample: Sample) -> None:
    """Bit for bit, eager and, of each family, captured whole; attention alone has one scale for its three inputs."""
    torch.manual_seed(0)
    layer = LAYER_FOR[sample.type].from_float(sample.layer(), EVERY_SITE).eval()
    inputs = tuple(x.detach() for x in sample.inputs())
    if sample.type is nn.MultiheadAttention:
        inputs = (inputs[1],) * 3
    before = list(layer.state_dict())
    expected = tensors_of(layer(*inputs, **sample.call))
    result = calibrate(layer, [inputs])
    assert result is layer
    assert set(layer.state_dict()) > set(before)
    models = [layer]
    if sample.type in COMPILED:
        models.append(torch.compile(layer, backend="aot_eager", fullgraph=True))
    for model in models:
        for a, b in zip(tensors_of(model(*inputs, **sample.call)), expected, strict=True):
            assert torch.equal(a, b)


@every_layer
def test_scales_travel(sample: Sample) -> None:
    torch.manual_seed(0)
    fresh = LAYER_FOR[sample.type].from_float(sample.layer(), EVERY_SITE).eval()
    layer, inputs = copy.deepcopy(fresh), tuple(x.detach() for x in sample.inputs())
    # doubled, so that static and dynamic scales differ
    calibrate(layer, [tuple(2 * x if x.is_floating_point() else x for x in inputs)])
    expected, scales = tensors_of(layer(*inputs, **sample.call)), scales_of(layer)
    assert scales
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert fresh.load_state_dict(torch.load(file)) == nn.Module().load_state_dict({}), "no key is missing or unexpected"
    for twin in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(scales_of(twin), scales, rtol=0, atol=0)
        for a, b in zip(tensors_of(twin(*inputs, **sample.call)), expected, strict=True):
            assert torch.equal(a, b)
    wide = copy.deepcopy(layer).to(torch.float64)
    for name, value in scales_of(wide).items():
        assert value.dtype is (torch.float64 if name.endswith("scale") else torch.int32)
    assert "scales: " in repr(layer)
    back = layer.to_float()
    assert list(back.state_dict()) == list(sample.layer().state_dict())
    assert not hasattr(back, "_watch")
    assert scales_of(layer), "of which to_float leaves nothing behind, but in the layer itself"
    layer.clear_scales()
    assert not scales_of(layer)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    loaded = datasets.load_digits()
    x, y = torch.tensor(loaded.data, dtype=torch.float32) / 16, torch.tensor(loaded.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]]


@functools.cache
def trained_on_digits() -> nn.Module:
    x, y, _, _ = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(72, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for epoch in range(12):
        for rows in torch.randperm(len(y), generator=torch.Generator().manual_seed(epoch)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("observer", OBSERVERS)
def test_digits(observer: str) -> None:
    x, _, test_x, test_y = digits()
    model = trained_on_digits()
    quantized = calibrate(convert(model, "int8"), x[:600].split(100), observer=observer)
    assert accuracy(model, test_x, test_y) > 0.93
    # 2·mean|x| / sqrt(127) is where training starts, and cuts the largest fifth of a uniform distribution off
    assert accuracy(quantized, test_x, test_y) > accuracy(model, test_x, test_y) - (0.2 if observer == "lsq" else 0.01)
    assert {f"{i}.input_scale" for i in (1, 2, 3, 4, 6, 7, 8)} <= set(quantized.state_dict())


def test_asymmetric_integers_use_the_whole_range_after_relu() -> None:
    layer = convert(nn.ReLU(), QuantSpec(output="int8_asymmetric"))
    x = torch.linspace(-3, 5.1, 1000)
    calibrate(layer, [x])
    codes = torch.round(layer(x) / layer.output_scale) + layer.output_zero_point
    assert (codes.min(), codes.max()) == (-128, 127)
    assert len(codes.unique()) > 250
    torch.testing.assert_close(layer.output_scale, torch.tensor(5.1 / 255))


def test_static_scales_do_not_follow_the_input() -> None:
    layer = calibrate(convert(nn.Linear(6, 4), "int8"), [data()])
    x = 10 * data()
    largest = 127 * layer.input_scale
    clipped = fake_quantize(x.clamp(-largest, largest), "int8", scale=layer.input_scale)
    torch.testing.assert_close(layer(x), F.linear(clipped, layer._weight(layer.weight), layer.bias))
    torch.testing.assert_close(layer(x)[:0], torch.empty(0, 4))


def test_batches_of_every_kind_and_the_same_scales() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.layer(x) + shift

    torch.manual_seed(0)
    model, shift = convert(Two(), "int8"), torch.ones(4)
    scales = []
    for batch in ((data(), shift), [data(), shift], {"x": data(), "shift": shift}):
        scales.append(calibrate(copy.deepcopy(model), [batch]).layer.input_scale)
    scales.append(calibrate(model, (pair for pair in [(data(), shift)])).layer.input_scale)
    assert all(torch.equal(scale, scales[0]) for scale in scales)
    # ranges add up over batches, in a shared layer over its calls, and a second calibration starts anew
    assert calibrate(model, [(data(), shift), (3 * data(), shift)]).layer.input_scale == 3 * scales[0]
    assert calibrate(model, [(data(), shift)]).layer.input_scale == scales[0]


def test_the_model_comes_back_as_it_was() -> None:
    model = convert(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)), "int8")
    model[1].eval()
    seen: list[tuple[bool, bool]] = []
    model.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    statistics = model[1].running_mean.clone()
    calibrate(model, [data()])
    assert seen == [(False, False)]
    assert [module.training for module in model] == [True, False, True]
    assert torch.equal(model[1].running_mean, statistics)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calibrate(model, [torch.ones(2, 5)])
    assert [module.training for module in model] == [True, False, True]
    assert not any("_watch" in vars(module) or module._forward_pre_hooks for module in model)


def test_a_compiled_model_is_calibrated_and_follows() -> None:
    model = convert(network(), "int8").eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = data()
    compiled(x)
    calibrate(compiled, [3 * x])
    assert model[0].input_scale is not None
    assert torch.equal(compiled(x), model(x))


def test_what_serves_several_tensors_stays_dynamic_and_is_reported() -> None:
    model = convert(nn.Sequential(Wired()), QuantSpec("int8", PER_CHANNEL, "int8", "int8", "int8"))
    with fuse_pass.collect() as report:
        calibrate(model, [torch.arange(5)])
    left = {(decline.where, decline.detail.split(":")[0]) for decline in report.declines}
    assert left == {
        ("0.attention", "weight"), ("0.attention", "bias"), ("0.attention", "output"),
        ("0.lstm", "weight"), ("0.lstm", "bias"), ("0.lstm", "state"),
        ("0.table", "weight"), ("0.unused", "no batch reached the layer"),
    }  # fmt: skip
    assert {decline.reason for decline in report.declines} == {fuse_pass.Reason.DYNAMIC_SCALE}
    assert {name for name in scales_of(model) if "unused" not in name} == {
        "0.attention.input_scale", "0.lstm.input_scale", "0.lstm.output_scale", "0.table.output_scale",
    }  # fmt: skip
    assert report.counts()["calibrate"] == len(scales_of(model))


@pytest.mark.parametrize(
    ("granularity", "shape", "why"),
    [
        (fuse_pass.Granularity("channel", axis=-1), (1, 6), ""),
        (fuse_pass.Granularity("channel", axis=0), None, "axis 0 is the batch"),
        (fuse_pass.Granularity("token"), None, "a scale per token belongs to one batch"),
        (fuse_pass.Granularity("group", size=2), None, "a scale per group belongs to one batch"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_granularities_of_an_input(granularity: fuse_pass.Granularity, shape: tuple[int, ...] | None, why: str) -> None:
    spec = QuantSpec(input=Site("int8", granularity=granularity))
    layer = convert(nn.Linear(6, 4), spec)
    x = data()
    expected = layer(x)
    with fuse_pass.collect() as report:
        calibrate(layer, [x])
    assert torch.equal(layer(x), expected)
    if shape is None:
        assert [decline.detail for decline in report.declines] == [f"input: {why}"]
        assert not scales_of(layer)
        strict = convert(nn.Linear(6, 4), QuantSpec(input=Site("int8", granularity=granularity, scale="static")))
        with pytest.raises(ValueError, match=f"input of the model .QuantizedLinear. has scale='static', but {why}"):
            calibrate(strict, [x])
    else:
        assert tuple(layer.input_scale.shape) == shape
        assert torch.equal(layer(x.view(2, 16, 6)).view(32, 4), expected), "another number of dimensions"


@pytest.mark.parametrize("kind", ["channel", "group"])
def test_granularities_of_a_weight(kind: str) -> None:
    granularity = fuse_pass.Granularity(kind, size=4 if kind == "group" else None)
    layer = convert(nn.Linear(6, 4), QuantSpec(weight=Site("int4", granularity=granularity)))
    x = data()
    expected = layer(x)
    calibrate(layer, [x])
    assert tuple(layer.weight_scale.shape) == ((4, 1) if kind == "channel" else (4, 2, 1))
    assert torch.equal(layer(x), expected)


def test_floating_point_has_a_scale_where_the_site_says_so() -> None:
    x = 1e-3 * data()
    free = convert(nn.Tanh(), "fp8_e4m3")
    with pytest.raises(ValueError, match="no site takes a scale in fp8_e4m3"):
        calibrate(free, [x])
    for scale in ("static", "dynamic"):
        layer = convert(nn.ReLU(), QuantSpec(input=Site("fp8_e4m3", scale=scale)))
        if scale == "static":
            calibrate(layer, [x])
        assert torch.equal(layer(x), fake_quantize(x, "fp8_e4m3", scale="absmax").relu())


def test_a_static_site_waits_for_its_scale() -> None:
    model = convert(network(), STATIC)
    with pytest.raises(RuntimeError, match=r"QuantizedLinear: the scale of 'input' is static .* fuse_pass.calibrate"):
        model(data())
    calibrate(model, [data()])
    assert torch.equal(model(data()), convert(network(), QuantSpec(input="int8", weight="int8"))(data()))
    fixed = convert(network(), QuantSpec(input=Site("int8", scale="dynamic"), weight="int8"))
    assert not any("input" in name for name in scales_of(calibrate(fixed, [data()]))), "dynamic for good"
    layer = convert(nn.Linear(6, 4), STATIC)
    layer.set_scale("input", torch.tensor(0.5))
    assert layer(data()).shape == (32, 4)
    for site, zero_point in (("output", None), ("grad", None), ("inputs", None), ("input", torch.tensor(3))):
        with pytest.raises(ValueError, match="set_scale"):
            layer.set_scale(site, torch.tensor(0.5), zero_point)


@pytest.mark.parametrize("observer", [*OBSERVERS, MovingAverage, functools.partial(Percentile, percent=99.0)])
def test_observers_by_name_class_and_function(observer: Any) -> None:
    layer = calibrate(convert(nn.Linear(6, 4), "int8"), [data(), data(seed=1)], observer=observer)
    assert 0 < layer.input_scale < 0.2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda: print, [data()]), TypeError, "expected a torch.nn.Module, got builtin_function"),
        ((network, [data()]), ValueError, "no quantised layer; convert it first"),
        ((lambda: convert(network(), "int8"), []), ValueError, "there was no batch"),
        ((lambda: convert(network(), "int8"), data()), TypeError, "got one Tensor; put it into a list"),
        ((lambda: convert(network(), "int8"), {"input": data()}), TypeError, "got one dict"),
        ((lambda: convert(network(), "int8"), [data(), 3]), TypeError, "batch 2: expected a tensor, tuple or dict"),
        ((lambda: convert(network(), "fp8_e5m2"), [data()]), ValueError, r"no site takes a scale in fp8_e5m2 \(input"),
        ((lambda: convert(network(), "int8"), [data() / 0]), ValueError, "input of 0: NaN or infinity"),
    ],
)
def test_mistakes(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    model = arguments[0]()
    with pytest.raises(error, match=message):
        calibrate(model, arguments[1])
    assert not isinstance(model, nn.Module) or not scales_of(model), "an error leaves the model as it was"


def test_mistakes_in_names_and_sites() -> None:
    with pytest.raises(ValueError, match="unknown observer 'max'; valid names are minmax, moving_average"):
        calibrate(convert(network(), "int8"), [data()], observer="max")
    with pytest.raises(ValueError, match="unknown scale 'fixed' of a Site; valid are dynamic, static, learned"):
        Site("int8", scale="fixed")
    with pytest.raises(ValueError, match="mxfp8 brings its own scale"):
        Site("mxfp8", scale="static")
    with pytest.raises(ValueError, match="only integers have a learned scale, not fp8_e4m3"):
        Site("fp8_e4m3", scale="learned")
    with pytest.raises(ValueError, match=r"QuantSpec.grad: the scale of a gradient is dynamic"):
        QuantSpec(grad=Site("int8", scale="static"))
    with pytest.raises(ValueError, match="learn_scales needs an integer format"):
        convert(network(), "fp8_e4m3", learn_scales=True)


def test_the_bar_is_an_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    model = convert(nn.Linear(6, 4), "int8")
    calibrate(model, [data()] * 3)
    assert capsys.readouterr().err == "", "a short run, and no terminal"
    calibrate(model, [data()] * 3, progress=True)
    shown = capsys.readouterr()
    assert "calibrate" in shown.err
    assert "/3 [" in shown.err
    assert shown.out == ""
    real_import = builtins.__import__

    def without_tqdm(name: str, *rest: Any) -> Any:
        if name == "tqdm":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    calibrate(model, [data()] * 3, progress=True)
    assert capsys.readouterr().err == ""


def test_layers_shared_by_name_are_calibrated_once() -> None:
    shared = nn.Linear(6, 6)
    model = convert(nn.Sequential(shared, nn.Tanh(), shared), "int8")
    with fuse_pass.collect() as report:
        calibrate(model, [data()])
    assert [match.where for match in report.matches if match.variant.startswith("input")] == ["0", "1"]
    assert isinstance(model[2], QuantizedLayer)
    assert model[2].input_scale is model[0].input_scale
