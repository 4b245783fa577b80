"""Every op of the package: none is forgotten, and those that fused graphs hold agree in ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import fuse_pass
from fuse_pass import FusedDropoutLayerNorm, fake_quantize
from fuse_pass.integrations.onnx import bodies, export
from fuse_pass.ops.fake_quantize import FloatRounding
from fuse_pass.ops.packed_format import pack
from tests.integrations.onnx.runtime import Exported

ours = torch.ops.fuse_pass


def test_every_op_has_a_body_or_a_reason() -> None:
    """A new op that is in neither table would be found by users."""
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fuse_pass::")
    }
    assert len(registered) > 30
    refused = {name for name in registered if bodies.refusal(name)}
    assert registered == bodies.known() | refused
    assert not bodies.known() & refused


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


x, w1, b1, wu, w2, b2 = (torch.randn(*shape) / 3 for shape in ((4, 5, 8), (12, 8), (12,), (12, 8), (6, 12), (6,)))
FP8 = pack(FloatRounding(4, 3, 7, "fn", "nearest", True, "saturate"))
BETWEEN = (None, None, 0.0, "gelu", [])
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], set[str]]] = {
    "dense": (lambda x, w, b: ours.dense(x, w, b), (x, w1, b1), {"Gemm", "MatMul"}),
    "dense_act": (lambda x, w, b: ours.dense_act(x, w, b, "silu", []), (x, w1, b1), {"Sigmoid", "Swish"}),
    "dense_prepacked": (lambda x, w, b: ours.dense_prepacked(x, w, b, "gelu", []), (x, w1, b1), {"Gelu"}),
    "dense_act_dense": (lambda *t: ours.dense_act_dense(*t, *BETWEEN)[0], (x, w1, b1, w2, b2), {"Gelu"}),
    "its hidden value": (lambda *t: ours.dense_act_dense(*t, *BETWEEN)[1], (x, w1, b1, w2, b2), {"Gemm", "MatMul"}),
    "dense_act_dense_inference": (
        lambda *t: ours.dense_act_dense_inference(*t, None, None, 0.0, "leaky_relu", [0.1]),
        (x, w1, b1, w2, b2),
        {"LeakyRelu"},
    ),
    "with fp8 between": (
        lambda *t: ours.dense_act_dense_inference(*t, *BETWEEN, FP8, FP8, FP8),
        (x, w1, b1, w2, b2),
        {"QuantizeLinear"},
    ),
    "act_dense": (lambda h, w, b: ours.act_dense(h, w, b, *BETWEEN), (torch.randn(4, 12), w2, b2), {"Gelu"}),
    "gated_dense": (
        lambda x, w, u, v: ours.gated_dense(x, w, None, u, None, v, None, None, 0.0, "silu", [], False)[0],
        (x, w1, wu, w2),
        {"Mul"},
    ),
    "gated_dense_inference": (
        lambda x, w, v, b: ours.gated_dense_inference(x, w, None, None, None, v, b, None, 0.0, "gelu", [], True),
        (x, torch.randn(24, 8), w2, b2),
        {"Gelu"},
    ),
    "dropout_norm": (
        lambda x, r, w, b: ours.dropout_norm(x, r, w, b, None, 0.0, 1e-5, 1, "layer_norm", None, True)[0],
        (x, torch.randn(4, 5, 8), torch.randn(8), torch.randn(8)),
        {"LayerNormalization"},
    ),
    "its sum": (
        lambda x, r: ours.dropout_norm(x, r, None, None, None, 0.0, 1e-5, 2, "layer_norm", None, True)[1],
        (x, torch.randn(4, 5, 8)),
        {"Add"},
    ),
    "rms norm": (
        lambda x, w: ours.dropout_norm(x, None, w, None, None, 0.0, 1e-5, 1, "rms_norm", None, False, [], True)[0],
        (x, torch.randn(8)),
        {"Sqrt", "ReduceMean"},
    ),
    "norm of an fp8 sum": (
        lambda x: ours.dropout_norm(x, None, None, None, None, 0.0, 1e-5, 1, "layer_norm", None, False, FP8)[0],
        (x,),
        {"QuantizeLinear"},
    ),
    "gemm": (lambda x, w, b: ours.gemm(x, w, b, "gelu", [], "none"), (torch.randn(4, 8), w1, b1), {"Gelu"}),
    "gemm_prepacked": (
        lambda x, w, b: ours.gemm_prepacked(x, w, b, "none", [], ""),
        (torch.randn(4, 8), w1, b1),
        {"Gemm"},
    ),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_fused_ops_are_standard_operators(name: str) -> None:
    function, tensors, expected = CALLS[name]
    model = Call(function)
    exported = Exported(model, *tensors)
    y = model(*tensors)
    torch.testing.assert_close(exported(*tensors), y, atol=2e-6, rtol=2e-6)
    assert expected & set(exported.nodes), exported.nodes
    assert {opset.domain for opset in exported.proto.opset_import} <= {"", "ai.onnx"}


def test_dropout_in_training_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), FusedDropoutLayerNorm(4, dropout=0.3))
    with pytest.raises(NotImplementedError, match=r"layer '1' \(FusedDropoutLayerNorm\) calls fuse_pass.seed, .*eval"):
        export(model, (torch.randn(2, 4),))
    assert Exported(model.eval(), torch.randn(2, 4)).nodes["LayerNormalization"] == 1


@pytest.mark.parametrize("seed", [None, 7])
def test_stochastic_rounding_is_refused(seed: int | None) -> None:
    model = Call(lambda x: fake_quantize(x, "fp8_e4m3", rounding="stoc_prop", seed=seed))
    with pytest.raises(NotImplementedError, match="deterministic rounding"):
        export(model, (torch.randn(2, 4),))


def test_a_model_on_meta_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="expected a model with data, got 'weight' on the meta device"):
        export(nn.Linear(3, 4, device="meta"), (torch.randn(2, 3),))


def test_an_opset_before_all_others() -> None:
    with pytest.raises(ValueError, match="needs opset 18 or newer, got opset_version=17"):
        export(nn.Linear(3, 4), (torch.randn(2, 3),), opset_version=17)


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys, torch, fuse_pass\n"
        "sys.modules['onnxscript'] = None\n"
        "from fuse_pass.integrations.onnx import export\n"
        "export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "needs onnxscript: pip install 'fuse_pass[onnx]'" in result.stderr


def test_a_program_and_a_file(tmp_path) -> None:
    model, x = fuse_pass.convert(nn.Linear(8, 8), "int8").eval(), torch.randn(3, 8)
    path = tmp_path / "model.onnx"
    export(torch.export.export(model, (x,)), (), path, verbose=False, input_names=["rows"])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    y = session.run(None, {"rows": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(y), model(x), atol=1e-6, rtol=1e-6)


def test_the_model_stays_as_it_is() -> None:
    model = fuse_pass.pack(nn.Linear(64, 16), "int4_weight_only")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, (torch.randn(2, 64),), verbose=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
