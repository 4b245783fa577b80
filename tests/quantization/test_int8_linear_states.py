"""Copies, casts and state dicts of the LLM.int8 layers, those of bitsandbytes included."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn

from fuse_pass.nn import FusedDenseGELUDense, Int8Linear
from tests.quantization.test_int8_linear import DIM, HIDDEN, LINEARS, ROWS, layer_of


@pytest.mark.parametrize("quantized", [False, True])
def test_copies_pickles_and_files(quantized: bool) -> None:
    layer, x = layer_of(), torch.randn(ROWS, DIM)
    layer = layer.quantize_() if quantized else layer
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = layer_of()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_stay_float32_whatever_the_layer_is_cast_to(dtype: torch.dtype) -> None:
    layer, x = layer_of().quantize_(), torch.randn(ROWS, DIM)
    scale, expected = layer.dense1.weight_scale.clone(), layer(x)
    layer.to(dtype)
    assert layer.dense1.weight.dtype is torch.int8
    assert layer.dense1.weight_scale.dtype is torch.float32
    assert torch.equal(layer.dense1.weight_scale, scale)
    assert layer.dense1.bias.dtype is dtype
    torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02)
    meta = layer.to("meta")
    assert meta.dense1.weight_scale.device.type == meta.dense1.weight.device.type == "meta"


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", ["float16", "int8"])
@pytest.mark.parametrize("source", ["float", "float16", "int8", "SCB"])
def test_any_kind_of_state_dict_loads_into_any_kind_of_layer(source: str, target: str, assign: bool) -> None:
    given, x = layer_of(0.0), torch.randn(ROWS, DIM)
    expected = given(x)
    state = dict(given.state_dict())
    if source in ("int8", "SCB"):
        state = dict(given.quantize_().state_dict())
    if source == "SCB":  # as bitsandbytes saves it: the largest magnitude of each row
        for part in LINEARS:
            state[f"{part}.SCB"] = state.pop(f"{part}.weight_scale") * 127
            state[f"{part}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    if source == "float":
        state = {name: value.float() for name, value in state.items()}
    layer = layer_of(0.0)
    layer = layer.quantize_() if target == "int8" else layer
    names = list(state)
    result = layer.load_state_dict(state, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(state) == names  # the caller's dictionary is not touched
    assert layer.dense1.is_quantized == (target == "int8" or source in ("int8", "SCB"))
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantized", [False, True])
def test_states_that_cannot_be_loaded(quantized: bool) -> None:
    def target() -> FusedDenseGELUDense:
        return layer_of().quantize_() if quantized else layer_of()

    state = layer_of().quantize_().state_dict()
    without_scale = {name: value for name, value in state.items() if name != "dense1.weight_scale"}
    other_layout = {**state, "dense2.weight_format": torch.tensor(2, dtype=torch.uint8)}
    other_size = FusedDenseGELUDense(DIM, HIDDEN + 1, has_fp16_weights=True).quantize_().state_dict()
    for bad, message in (
        (without_scale, "expected its scales in dense1.weight_scale"),
        (other_layout, "row-major"),
        (other_size, "size mismatch"),
        ({name: value for name, value in state.items() if "dense1" in name}, "Missing key"),
    ):
        with pytest.raises(RuntimeError, match=message):
            target().load_state_dict(bad)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        FusedDenseGELUDense(DIM, HIDDEN).load_state_dict(state)


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def test_bitsandbytes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer = torch.randn(ROWS, DIM), layer_of()
    expected = layer(x), copy.deepcopy(layer).quantize_()(x)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert torch.equal(layer(x), expected[0])
    assert torch.equal(layer.quantize_()(x), expected[1])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_from_bitsandbytes(quantized: bool, bias: bool, threshold: float) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def linear(inputs: int, outputs: int) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=not quantized, threshold=threshold)
        return layer.to("cpu") if quantized else layer

    theirs = nn.Sequential()
    theirs.dense1, theirs.act, theirs.dense2 = linear(DIM, HIDDEN), nn.GELU(), linear(HIDDEN, DIM)
    ours = FusedDenseGELUDense.from_bitsandbytes(theirs)
    assert ours.dense1.is_quantized == quantized
    assert (ours.dim, ours.dim_out, ours.bias, ours.threshold) == (DIM, HIDDEN, bias, threshold)
    x = torch.randn(ROWS, DIM)
    expected = theirs.dense2(theirs.act(theirs.dense1(x)))
    # bitsandbytes rounds activations and weights to float16 before it quantises them.
    torch.testing.assert_close(ours(x), expected.float(), rtol=0, atol=2e-2 * expected.abs().max().item())
    if quantized:
        assert torch.equal(ours.dense1.weight, theirs.dense1.weight.data)


def test_from_bitsandbytes_refuses_other_layers() -> None:
    with pytest.raises(TypeError, match="Linear8bitLt, got Linear"):
        Int8Linear.from_bitsandbytes(nn.Linear(2, 3))
