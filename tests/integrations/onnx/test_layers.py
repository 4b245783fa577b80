"""Every layer of the package in ONNX Runtime: it agrees, or is on the list of those that are not exported, by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import fuse_pass
from fuse_pass.integrations.onnx import export
from fuse_pass.quantization.layers import LAYER_FOR
from fuse_pass.quantization.packing import SPECS, PackSpec
from tests.integrations.onnx.runtime import Exported
from tests.quantization.samples import SAMPLES, Sample

# What torch.onnx or ONNX has no word for, plain `torch.nn` or quantised, with what it says.
NOT_EXPORTED: dict[str, str] = {
    "AdaptiveMaxPool1d": "aten.adaptive_max_pool2d",
    "AdaptiveMaxPool2d": "aten.adaptive_max_pool2d",
    "AdaptiveMaxPool3d": "aten.adaptive_max_pool3d",
    "AdaptiveAvgPool3d": "aten._adaptive_avg_pool3d",
}

# An export takes seconds; all others are `slow`.
USUAL = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.LSTM, nn.MultiheadAttention, nn.Embedding, nn.GELU)


def sweep() -> list[Any]:
    def marks(sample: Sample, fmt: str) -> tuple[pytest.MarkDecorator, ...]:
        return () if sample.type in USUAL and fmt == "int8" else (pytest.mark.slow,)

    pairs = ((sample, fmt) for sample in SAMPLES for fmt in ("int8", "fp8_e4m3"))
    return [pytest.param(sample, fmt, marks=marks(sample, fmt), id=f"{sample.id} {fmt}") for sample, fmt in pairs]


def sample_inputs(sample: Sample) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in sample.inputs())


class WithCall(nn.Module):
    def __init__(self, layer: nn.Module, call: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *args: Tensor) -> Any:
        return self.layer(*args, **self.call)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value if part is not None for tensor in flat(part)]


def assert_agrees(model: nn.Module, *args: Tensor, tolerance: float = 1e-5) -> Exported:
    exported = Exported(model, *args)
    expected, actual = flat(model(*args)), flat(exported(*args))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), atol=tolerance, rtol=tolerance)
    return exported


@pytest.mark.parametrize(("sample", "format"), sweep())
def test_quantized_layers(sample: Sample, format: str) -> None:
    layer = LAYER_FOR[sample.type].from_float(sample.layer(), format).eval()
    model, args = WithCall(layer, sample.call).eval(), sample_inputs(sample)
    reason = NOT_EXPORTED.get(sample.id)
    if reason is not None:
        with pytest.raises(torch.onnx.OnnxExporterError, match=reason):
            assert_agrees(model, *args)
        return
    # A sum that ends next to a tie is a step of the format away.
    assert_agrees(model, *args, tolerance=1e-5 if format == "int8" else 0.13)


def test_every_public_layer_is_here() -> None:
    of_other_tests = (
        "BitLinear", "FusedDenseGELUDense", "FusedDropoutLayerNorm", "Int8Linear", "PackedConv2d", "PackedEmbedding",
        "PackedGRU", "PackedLSTM", "PackedLinear", "PackedMultiheadAttention", "PackedQuantizedConv2d",
        "PackedQuantizedLinear", "PackedRNN", "QuantizedLayer",
    )  # fmt: skip
    tested = {LAYER_FOR[sample.type] for sample in SAMPLES} | {getattr(fuse_pass.nn, name) for name in of_other_tests}
    public = [getattr(fuse_pass.nn, name) for name in fuse_pass.nn.__all__]
    assert {layer for layer in public if isinstance(layer, type)} == tested


PACKED_PARTS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Conv2d": (nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 9, 7)),
    "Conv2d of groups": (nn.Conv2d(8, 12, (3, 2), groups=4, padding="same", bias=False), (2, 8, 9, 7)),
    "MultiheadAttention": (WithCall(nn.MultiheadAttention(32, 4, batch_first=True), {}), (2, 5, 32)),
    "LSTM": (nn.LSTM(24, 16, batch_first=True), (2, 3, 24)),
    "GRU": (nn.GRU(24, 16, bidirectional=True), (3, 2, 24)),
    "RNN": (nn.RNN(24, 16), (3, 2, 24)),
}


@pytest.mark.parametrize("spec", ["int8", "int4_weight_only"])
@pytest.mark.parametrize(("layer", "shape"), PACKED_PARTS.values(), ids=PACKED_PARTS)
def test_packed_layers_of_other_kinds(layer: nn.Module, shape: tuple[int, ...], spec: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = fuse_pass.pack(layer, spec).eval()
    operands = (x, x, x) if "Multihead" in str(packed) else (x,)
    assert_agrees(packed, *operands, tolerance=2e-2 if spec == "int8" else 1e-5)  # next to a tie: a step of int8


def block(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 48, bias=bias), nn.GELU(), nn.Linear(48, 40, bias=bias)).eval()


@pytest.mark.parametrize("spec", [*SPECS, PackSpec("int4_weight_only", group=32, symmetric=False)], ids=str)
def test_packed(spec: Any) -> None:
    model, x = fuse_pass.pack(block(), spec), torch.randn(7, 64)
    exported = assert_agrees(model, x, tolerance=2e-6)
    spec = spec if isinstance(spec, PackSpec) else PackSpec(spec)
    if spec.kind == "weight_only" and spec.table in ("", "int4"):
        assert exported.nodes["MatMulNBits"] == 2
    elif spec.kind != "weight_only":
        assert exported.nodes["MatMulInteger"] == 2


@pytest.mark.parametrize("spec", SPECS)
def test_packed_files_are_small(spec: str) -> None:
    model = fuse_pass.pack(nn.Linear(512, 512, bias=False).eval(), spec)
    size = Exported(model, torch.randn(2, 512)).size
    # The codes, and scales: one a row, or one for each 64 (int4, nf4, fp4) or 128 (int8) inputs.
    codes = 512 * 512 * PackSpec(spec).bits // 8
    assert codes <= size <= codes + 512 * 8 * 4 + 1000


@pytest.mark.parametrize(
    ("input", "weight"),
    [
        ("int8", "int8"),
        ("int8_asymmetric", "int8_asymmetric"),
        ("int8", "int4"),
        (None, "int4"),
        (None, "int8"),
        (None, "int8_asymmetric"),
    ],
)
def test_packed_converted(input: str | None, weight: str) -> None:
    rows = fuse_pass.Site(weight, granularity=fuse_pass.Granularity("channel", axis=0))
    model, x = fuse_pass.convert(block(), fuse_pass.QuantSpec(input=input, weight=rows)), torch.randn(7, 64)
    fuse_pass.calibrate(model, [x])
    packed = fuse_pass.pack(copy.deepcopy(model))
    assert any(isinstance(module, fuse_pass.nn.PackedQuantizedLinear) for module in packed.modules())
    assert_agrees(packed, x, tolerance=2e-6)


@pytest.mark.parametrize("size", [16, 24])
def test_packed_groups_of_any_size(size: int) -> None:
    """Blocks of 16 are MatMulNBits'; of 24, blocks of 8 that it has not: arithmetic."""
    groups = fuse_pass.Site("int4", granularity=fuse_pass.Granularity("group", size=size))
    model = fuse_pass.convert(nn.Linear(48, 20).eval(), fuse_pass.QuantSpec(weight=groups))
    packed = fuse_pass.pack(model)
    assert isinstance(packed, fuse_pass.nn.PackedQuantizedLinear)
    exported = assert_agrees(packed, torch.randn(5, 48), tolerance=2e-6)
    assert bool(exported.nodes["MatMulNBits"]) is (size == 16)


@pytest.mark.parametrize("spec", ["int4_weight_only", "int8_weight_only", "nf4"])
def test_packed_embeddings(spec: str) -> None:
    model = fuse_pass.pack(nn.Sequential(nn.Embedding(300, 64)), spec).eval()
    exported = assert_agrees(model, torch.randint(0, 300, (3, 5)), tolerance=0)
    assert exported.size < 300 * 64 * PackSpec(spec).bits // 8 + 300 * 4 + 1000


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", ["b1", "b1.58"])
def test_bit_linear(variant: str, packed: bool) -> None:
    layer = fuse_pass.BitLinear(64, 32, groups=2, variant=variant).eval()
    assert_agrees(layer.pack() if packed else layer, torch.randn(3, 5, 64), tolerance=2e-6)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_llm_int8(threshold: float) -> None:
    layer = fuse_pass.FusedDenseGELUDense(64, 96, has_fp16_weights=True, threshold=threshold).eval()
    x = torch.randn(6, 64)
    assert_agrees(layer, x, tolerance=2e-6)
    assert_agrees(layer.quantize_(), x, tolerance=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype is torch.float64 else 4e-3
    x = torch.randn(3, 64, dtype=dtype)
    relu = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40)).eval()  # ONNX Runtime has no erf of float64
    assert_agrees(fuse_pass.FusedDropoutLayerNorm(64).eval().to(dtype), x, tolerance=tolerance)
    assert_agrees(fuse_pass.convert(copy.deepcopy(relu), "int8").to(dtype), x, tolerance=tolerance)
    assert_agrees(fuse_pass.pack(relu, "int4_weight_only").to(dtype), x, tolerance=tolerance)


def test_bfloat16_becomes_a_model_of_that_type() -> None:
    """NumPy has no bfloat16 and ONNX Runtime no CPU kernels for most of it: what is written is looked at."""
    program = export(
        fuse_pass.FusedDenseGELUDense(8, 16).eval().bfloat16(), (torch.randn(2, 8).bfloat16(),), verbose=False
    )
    assert [node.op_type for node in program.model.graph] == ["Gemm", "Gelu", "Gemm"]
    assert {str(value.dtype) for value in program.model.graph.initializers.values()} == {"BFLOAT16"}


@pytest.mark.parametrize("kind", ["fused", "int8", "mxfp4", "int4_weight_only", "int8 packed", "b1.58"])
def test_dynamic_batches(kind: str) -> None:
    model = {
        "fused": lambda: nn.Sequential(fuse_pass.FusedDenseGELUDense(64, 32), fuse_pass.FusedDropoutLayerNorm(64)),
        "int8": lambda: fuse_pass.convert(block(), "int8"),
        "mxfp4": lambda: fuse_pass.convert(nn.Linear(32, 16), fuse_pass.QuantSpec(input="mxfp4")),
        "int4_weight_only": lambda: fuse_pass.pack(block(), "int4_weight_only"),
        "int8 packed": lambda: fuse_pass.pack(block(), "int8"),
        "b1.58": lambda: fuse_pass.BitLinear(64, 32, variant="b1.58"),
    }[kind]().eval()
    width = 32 if kind == "mxfp4" else 64
    exported = Exported(model, torch.randn(4, width), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for rows in (1, 2, 9):
        x = torch.randn(rows, width)
        torch.testing.assert_close(exported(x), model(x), atol=2e-6, rtol=2e-6)
