"""A packed BitLinear: nothing that eval uses is lost, and it saves, loads, copies and moves."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from fuse_pass.nn import BitLinear

IN, OUT = 13, 6
VARIANTS = ("b1", "b1.58")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("in_features", [1, 7, 8, IN])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pack_and_unpack_change_nothing_that_eval_uses(variant: str, dtype: torch.dtype, in_features: int) -> None:
    layer = BitLinear(in_features, OUT, groups=3, bias=True, variant=variant, dtype=dtype).eval()
    x = torch.randn(5, in_features).to(dtype)
    expected = layer(x)
    assert layer.pack() is layer
    assert layer.is_packed
    assert layer.weight is None
    assert torch.equal(layer(x), expected)
    assert "packed" in repr(layer)
    packed = layer.pack().weight_packed.clone()
    assert packed.dtype is torch.uint8
    assert packed.shape == (OUT, -(-in_features // (8 if variant == "b1" else 4)))
    assert layer.unpack() is layer
    assert not layer.is_packed
    assert layer.weight.dtype is dtype
    assert layer.weight.requires_grad
    torch.testing.assert_close(layer.unpack()(x), expected, rtol=0 if dtype is not torch.float64 else 1e-13, atol=1e-15)
    assert torch.equal(layer.pack().weight_packed, packed)


def test_a_packed_weight_is_small() -> None:
    for variant, bits in (("b1", 1), ("b1.58", 2)):
        file = io.BytesIO()
        torch.save(BitLinear(1024, 512, variant=variant).pack().state_dict(), file)
        assert file.tell() < 1024 * 512 * bits / 8 + 4096


@pytest.mark.parametrize("way", ["torch", "safetensors", "assign", "onto a packed one", "from meta"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saves_and_loads_packed(variant: str, way: str, tmp_path: Path) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(BitLinear(IN, 8, 2, variant=variant), nn.ReLU(), BitLinear(8, OUT, bias=True))

    saved, x = model(), torch.randn(4, IN)
    expected = saved(x)
    saved[0].pack()
    fresh = model()
    if way == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_model(saved, str(tmp_path / "model.safetensors"))
        safetensors.load_model(fresh, str(tmp_path / "model.safetensors"))
    else:
        torch.save(saved.state_dict(), tmp_path / "model.pt")
        state = torch.load(tmp_path / "model.pt", weights_only=True)
        if way == "onto a packed one":
            fresh[0].pack()
        if way == "from meta":
            fresh = fresh.to("meta")
        fresh.load_state_dict(state, assign=way in ("assign", "from meta"))
    assert fresh[0].is_packed
    assert not fresh[2].is_packed
    assert torch.equal(fresh(x), expected)


def test_loads_a_weight_into_a_packed_layer() -> None:
    source, layer, x = BitLinear(IN, OUT), BitLinear(IN, OUT).pack(), torch.randn(4, IN)
    layer.load_state_dict(source.state_dict())
    assert not layer.is_packed
    assert torch.equal(layer(x), source(x))
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_state_dict_of_another_size_raises_and_changes_nothing(packed: bool) -> None:
    layer, other = BitLinear(IN, OUT), BitLinear(40, OUT)
    (layer if packed else other).pack()
    before = copy.deepcopy(layer.state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            layer.load_state_dict(other.state_dict(), strict=strict)
    assert layer.is_packed == packed
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("packed", [False, True])
def test_copies_and_pickles(packed: bool) -> None:
    layer, x = BitLinear(IN, OUT, bias=True), torch.randn(3, IN)
    if packed:
        layer.pack()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.is_packed == packed


def test_a_packed_layer_moves_between_dtypes() -> None:
    layer, x = BitLinear(IN, OUT, bias=True).pack(), torch.randn(3, IN)
    expected = layer(x)
    torch.testing.assert_close(layer.double()(x.double()).float(), expected)
    half = layer.to(torch.bfloat16)
    assert half.weight_packed.dtype is torch.uint8
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=5e-2, atol=5e-2)
    with pytest.raises(RuntimeError, match="unpack"):
        layer.reset_parameters()
