"""Layers of several products, packed: attention and recurrent layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fuse_pass
from fuse_pass import PackSpec, pack, unpack
from fuse_pass.nn import PackedGRU, PackedLSTM, PackedMultiheadAttention, PackedRNN
from fuse_pass.quantization.layers.packed import PackedLinear
from fuse_pass.quantization.packing import SPECS

pytestmark = pytest.mark.processor
WEIGHT_ONLY = ("int8_weight_only", "int4_weight_only", "nf4", "fp4")
Attention = dict[str, Any]
ATTENTIONS: dict[str, Attention] = {
    "batch first": {"batch_first": True},
    "sequence first": {},
    "without bias": {"bias": False, "batch_first": True},
    "other sizes": {"kdim": 24, "vdim": 40, "batch_first": True},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
every_attention = pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
RECURRENT: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {"batch_first": True}),
    "LSTM, two layers, both ways, projected": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 16}),
    "GRU": (nn.GRU, {"num_layers": 2}),
    "GRU, both ways, without bias": (nn.GRU, {"bidirectional": True, "bias": False, "batch_first": True}),
    "RNN": (nn.RNN, {}),
    "RNN of ReLU": (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "batch_first": True}),
}
every_recurrent = pytest.mark.parametrize(("kind", "options"), RECURRENT.values(), ids=RECURRENT)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(options: Attention) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 4, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(noise(*parameter.shape, seed=parameter.numel()) / 4)
    return layer.eval()


def operands(layer: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    """Query, key and value of 3 sequences, 5 and 7 long."""
    given = noise(3, 5, 32), noise(3, 7, layer.kdim, seed=2), noise(3, 7, layer.vdim, seed=3)
    return given if layer.batch_first else tuple(x.transpose(0, 1) for x in given)


def masks(*, boolean: bool) -> dict[str, Tensor]:
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    additive = noise(5, 7, seed=4)
    return {"key_padding_mask": padding, "attn_mask": additive > 1 if boolean else additive}


@every_attention
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_attention_is_that_of_the_real_weights(name: str, options: Attention) -> None:
    """Weights alone are packed, so that PyTorch's own layer with what the codes stand for is the reference."""
    layer = attention(options)
    packed = pack(layer, name)
    assert isinstance(packed, PackedMultiheadAttention)
    real, (q, k, v) = unpack(packed), operands(layer)
    assert type(real) is nn.MultiheadAttention
    for given in ({}, masks(boolean=True), masks(boolean=False)):
        for how in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            (y, weights), (expected, of_real) = packed(q, k, v, **given, **how), real(q, k, v, **given, **how)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            assert (weights is None) == (of_real is None)
            if weights is not None:
                torch.testing.assert_close(weights, of_real, rtol=1e-5, atol=1e-5)
    assert (packed(q, k, v)[0] - layer(q, k, v)[0]).norm() < 0.4 * layer(q, k, v)[0].norm()


@every_attention
def test_attention_of_int8_rounds_what_its_projections_read(options: Attention) -> None:
    layer = attention(options)
    packed, (q, k, v) = pack(layer, "int8"), operands(layer)
    assert isinstance(packed, PackedMultiheadAttention)
    expected = layer(q, k, v)[0]
    assert (packed(q, k, v)[0] - expected).norm() < 0.03 * expected.norm()
    assert all(isinstance(part, PackedLinear) for part in packed.children())
    assert packed.nbytes < 1.2 * sum(p.numel() for name, p in layer.named_parameters() if "weight" in name)
    one = packed(q[0], k[0], v[0])[0] if layer.batch_first else packed(q[:, 0], k[:, 0], v[:, 0])[0]
    torch.testing.assert_close(one, packed(q, k, v)[0][0] if layer.batch_first else packed(q, k, v)[0][:, 0])


def test_attention_trains_adapters_and_drops() -> None:
    packed = pack(nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True), "int8").train()
    x = noise(2, 5, 32).requires_grad_()
    assert not torch.equal(packed(x, x, x)[0], packed(x, x, x)[0])
    assert not torch.equal(packed(x, x, x, need_weights=False)[0], packed(x, x, x, need_weights=False)[0])
    packed(x, x, x)[0].sum().backward()
    assert x.grad is not None
    assert packed.out_proj.bias.grad is not None
    assert packed.q_proj.bias.grad is not None


@pytest.mark.parametrize("name", ["int8", "int4_weight_only"])
def test_encoder_layers_run_with_packed_attention(name: str) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    packed, x = pack(model, name), noise(2, 6, 32)
    kinds = [type(module) for module in packed.modules()]
    assert kinds.count(PackedMultiheadAttention) == 2
    with torch.no_grad():
        assert (packed(x) - model(x)).norm() < 0.25 * model(x).norm()
        torch.compiler.reset()
        with fuse_pass.collect() as report:
            y = fuse_pass.compile(packed, fullgraph=True)(x)
        torch.testing.assert_close(y, packed(x), rtol=1e-4, atol=1e-4)
    assert report.counts()["dropout_norm"] == 4
    restored = unpack(packed)
    assert [type(module) for module in restored.modules()] == [type(module) for module in model.modules()]


def both(kind: type[nn.RNNBase], options: dict[str, Any], spec: PackSpec | str) -> tuple[nn.RNNBase, Any]:
    torch.manual_seed(0)
    layer = kind(24, 32, **options).eval()
    return layer, pack(layer, spec)


@every_recurrent
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_recurrent_layers_are_those_of_the_real_weights(
    name: str, kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    layer, packed = both(kind, options, PackSpec(name, group=32))
    assert type(packed) is {nn.LSTM: PackedLSTM, nn.GRU: PackedGRU, nn.RNN: PackedRNN}[kind]
    real, x = unpack(packed), noise(3, 5, 24)
    assert repr(real) == repr(layer)
    for given in (x, x[0]):
        (y, state), (expected, of_real) = packed(given), real(given)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(state, of_real)
    torch.testing.assert_close(packed(x, packed(x)[1])[0], real(x, real(x)[1])[0])
    lengths = torch.tensor([5, 2, 4] if options.get("batch_first") else [3, 1, 3, 2, 2])
    sequence = pack_padded_sequence(x, lengths, enforce_sorted=False, batch_first=options.get("batch_first", False))
    (y, state), (expected, of_real) = packed(sequence), real(sequence)
    torch.testing.assert_close(y.data, expected.data)
    torch.testing.assert_close(state, of_real)


@every_recurrent
def test_recurrent_layers_of_int8(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    layer, packed = both(kind, options, "int8")
    x = noise(3, 5, 24)
    assert (packed(x)[0] - layer(x)[0]).norm() < 0.03 * layer(x)[0].norm()
    assert packed.nbytes < 1.5 * sum(p.numel() for name, p in layer.named_parameters() if "weight" in name)
    x.requires_grad_()
    packed(x)[0].sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["LSTM", "GRU, both ways, without bias"])
def test_recurrent_layers_compile_in_one_graph(name: str) -> None:
    _, packed = both(*RECURRENT[name], "int8")
    torch.compiler.reset()
    x = noise(2, 3, 24)
    y, state = torch.compile(packed, backend=fuse_pass.fuse_backend, fullgraph=True)(x)
    expected, of_eager = packed(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, of_eager)


@pytest.mark.parametrize("spec", SPECS)
def test_state_dicts_copies_dtypes_and_meta(spec: str) -> None:
    x = noise(2, 5, 32)
    for layer, arguments in ((attention({"batch_first": True}), (x, x, x)), (nn.LSTM(32, 16), (x,))):
        packed, other = pack(layer, spec), pack(copy.deepcopy(layer), spec)
        for buffer in other.buffers():
            buffer.copy_(buffer.clone())
        other.load_state_dict(packed.state_dict())
        for twin in (other, copy.deepcopy(packed)):
            assert torch.equal(twin(*arguments)[0], packed(*arguments)[0])
        with pytest.raises(RuntimeError, match="this layer is packed and expects words and scale, got a plain weight"):
            packed.load_state_dict(layer.state_dict())
        half = copy.deepcopy(packed).to(torch.bfloat16)
        assert half(*(argument.bfloat16() for argument in arguments))[0].dtype is torch.bfloat16
        assert all(buffer.dtype is not torch.bfloat16 for buffer in half.buffers())
        assert packed.to("meta")(*(argument.to("meta") for argument in arguments))[0].is_meta


def test_what_computes_something_else_is_declined() -> None:
    pruned = nn.utils.prune.random_unstructured(nn.LSTM(8, 8), "weight_hh_l0", 0.5)
    hooked, with_pruned_projection = attention({}), attention({})
    hooked.out_proj.register_forward_hook(lambda *arguments: None)
    nn.utils.prune.random_unstructured(with_pruned_projection.out_proj, "weight", 0.5)
    model = nn.ModuleList([pruned, hooked, with_pruned_projection])
    with fuse_pass.collect() as report:
        pack(model, "int8", inplace=True)
    assert [type(layer) for layer in model] == [nn.LSTM, nn.MultiheadAttention, nn.MultiheadAttention]
    found = {decline.where: decline.detail for decline in report.declines}
    assert found["0"] == found["2"] == "its weight is computed (pruned)"
    assert found["1"] == "its out_proj has hooks, which would be lost"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(2, 3, 23),), r"input.size\(-1\) must be equal to input_size. Expected 24, got 23"),
        ((torch.randn(2, 3, 4, 24),), "Expected input to be 2D or 3D, got 4D"),
        ((torch.randn(2, 3, 24), (torch.zeros(1, 2, 32), torch.zeros(1, 3, 31))), r"Expected hidden\[0\] size"),
        ((torch.randn(2, 3, 24), (torch.zeros(1, 3, 32), torch.zeros(1, 3, 31))), r"Expected hidden\[1\] size"),
        ((torch.randn(2, 3, 24), (torch.zeros(3, 32),) * 2), r"hx (and cx )?should also be 3-D"),
    ],
)
def test_wrong_inputs_raise_what_an_lstm_raises(arguments: tuple[Any, ...], message: str) -> None:
    layer = nn.LSTM(24, 32)
    for either in (layer, pack(layer, "int8")):
        with pytest.raises((RuntimeError, ValueError), match=message):
            either(*arguments)
