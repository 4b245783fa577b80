"""Embeddings whose tables are packed: what they give, what they hold, and how they come and go."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_pass
from fuse_pass import PackSpec, pack, unpack
from fuse_pass.nn import PackedEmbedding
from fuse_pass.quantization.packing import TABLES

SPECS = [
    PackSpec("int8_weight_only"),
    PackSpec("int4_weight_only"),
    PackSpec("int4_weight_only", group=32, symmetric=False),
    PackSpec("nf4", group=128),
    PackSpec("fp4"),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
TOKENS = torch.tensor([[3, 0, 49], [7, 7, 1]])


def embedding(dim: int = 96, dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(50, dim, dtype=dtype, padding_idx=1)


def packed_of(layer: nn.Embedding, spec: PackSpec) -> PackedEmbedding:
    found = pack(layer, spec)
    assert isinstance(found, PackedEmbedding)
    return found


@every_spec
@pytest.mark.parametrize("dim", [96, 7, 1, 65])
def test_rows_are_the_nearest_that_the_codes_can_say(dim: int, spec: PackSpec) -> None:
    """By the packed Linear of the same weight, whose rounding has tests of its own."""
    layer = embedding(dim)
    linear = nn.Linear(dim, 50, bias=False)
    linear.weight = layer.weight
    real = pack(linear, spec).real_weight()
    packed = packed_of(layer, spec)
    assert torch.equal(packed.real_weight(), real)
    assert torch.equal(packed(TOKENS), F.embedding(TOKENS, real))
    assert (packed(TOKENS) - layer(TOKENS)).norm() < (0.3 if spec.bits == 4 else 0.01) * layer(TOKENS).norm()


def test_four_bits_by_hand() -> None:
    layer = embedding(4)
    with torch.no_grad():
        layer.weight[3] = torch.tensor([0.5, -6.0, 3.0, 1.0])
    packed = packed_of(layer, PackSpec("fp4"))
    codes = [TABLES["fp4"].index(value) for value in (0.5, -6.0, 3.0, 1.0)]
    assert packed.words[3, :2].tolist() == [codes[0] | codes[1] << 4, codes[2] | codes[3] << 4]
    assert packed(torch.tensor(3)).tolist() == [0.5, -6.0, 3.0, 1.0]


@every_spec
def test_memory_is_what_the_bits_say(spec: PackSpec) -> None:
    layer = nn.Embedding(1000, 256)
    packed = packed_of(layer, spec)
    scales = 1000 * (256 // spec.group if spec.table else 1) * (1 if spec.symmetric else 2)
    assert packed.nbytes == 1000 * 256 * spec.bits // 8 + 4 * scales
    assert not list(packed.parameters())


@every_spec
def test_state_dicts_and_copies(spec: PackSpec) -> None:
    packed = packed_of(embedding(), spec)
    other = packed_of(nn.Embedding(50, 96), spec)
    other.load_state_dict(packed.state_dict())
    for twin in (other, copy.deepcopy(packed)):
        assert torch.equal(twin(TOKENS), packed(TOKENS))
    with pytest.raises(RuntimeError, match="this layer is packed and expects words and scale, got a plain weight"):
        packed.load_state_dict(embedding().state_dict())
    with pytest.raises(RuntimeError, match="packed_format: expected PackSpec"):
        packed.load_state_dict(packed_of(embedding(), PackSpec("nf4", group=32)).state_dict())


@every_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, spec: PackSpec) -> None:
    packed = packed_of(embedding(), spec)
    cast = copy.deepcopy(packed).to(dtype)
    assert torch.equal(cast(TOKENS), packed(TOKENS).to(dtype))
    assert cast.scale.dtype is torch.float32
    assert packed_of(embedding(dtype=dtype), spec)(TOKENS).dtype is dtype
    assert cast.to_float().weight.dtype is dtype


@every_spec
def test_compiled(spec: PackSpec) -> None:
    packed = packed_of(embedding(), spec)
    torch.compiler.reset()
    assert torch.equal(torch.compile(packed, backend=fuse_pass.fuse_backend, fullgraph=True)(TOKENS), packed(TOKENS))


@every_spec
def test_empty_and_meta(spec: PackSpec) -> None:
    packed = packed_of(embedding(), spec)
    assert packed(torch.empty(0, 3, dtype=torch.long)).shape == (0, 3, 96)
    assert packed_of(embedding().to("meta"), spec)(TOKENS.to("meta")).shape == (2, 3, 96)
    assert packed_of(nn.Embedding(3, 0), spec)(torch.tensor([1])).shape == (1, 0)


@pytest.mark.parametrize("indices", [torch.tensor([50]), torch.tensor([-1]), torch.tensor([0.5])])
def test_wrong_indices_raise_what_an_embedding_raises(indices: Tensor) -> None:
    layer = embedding()
    with pytest.raises((IndexError, RuntimeError)) as expected:
        layer(indices)
    with pytest.raises(expected.type):
        packed_of(layer, SPECS[0])(indices)


def test_specs_of_products_pack_the_table_alone() -> None:
    for name in ("int8", "llm_int8"):
        assert packed_of(embedding(), PackSpec(name)).spec == PackSpec("int8_weight_only")
    limited = nn.Embedding(5, 4, max_norm=1.0)
    with fuse_pass.collect() as report:
        assert type(pack(nn.Sequential(embedding()), "b1.58")[0]) is nn.Embedding
        assert type(pack(nn.Sequential(limited), "int8")[0]) is nn.Embedding
        assert type(pack(nn.Sequential(embedding()))[0]) is nn.Embedding
    details = [decline.detail for decline in report.declines]
    assert details == [
        "an Embedding has no packed layer of b1.58",
        "its table is written to in every call (max_norm)",
    ]


@every_spec
def test_unpacked(spec: PackSpec) -> None:
    packed = packed_of(embedding(), spec)
    back = unpack(packed)
    assert type(back) is nn.Embedding
    assert back.padding_idx == 1
    by_frequency = unpack(pack(nn.Embedding(5, 4, scale_grad_by_freq=True, sparse=True), spec))
    assert by_frequency.scale_grad_by_freq
    assert by_frequency.sparse
    assert torch.equal(back(TOKENS), packed(TOKENS))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_code_stands_for_what_is_not_finite(value: float) -> None:
    layer = embedding()
    with torch.no_grad():
        layer.weight[1, 2] = value
    with pytest.raises(ValueError, match="expected a finite weight, got one with NaN or infinity"):
        pack(layer, "int8")
