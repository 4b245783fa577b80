"""Packed weights on a GPU: products in the open, with the numbers of the CPU's kernels and no call of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fuse_pass.gemm.product import product
from fuse_pass.kernels import few_bits
from fuse_pass.ops import packed_dense
from fuse_pass.ops.packed_dense import PackedDense, PackedWeight

BITS = {"int8": 8, "b1.58": 2, "b1": 1}


def packed(kind: str, inner: int) -> tuple[Tensor, Tensor]:
    """A weight `[24, inner]` of integers, and its words."""
    low, high = (-127, 128) if kind == "int8" else (-1, 2)
    weight = torch.randint(low, high, (24, inner), dtype=torch.int8)
    weight = torch.where(weight == 0, 1, weight) if kind == "b1" else weight
    return weight, few_bits.pack(packed_dense.integer_codes(weight, kind), BITS[kind])


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("inner", [64, 37])
def test_integer_sums_in_the_open_are_those_of_the_kernel(kind: str, inner: int) -> None:
    weight, words = packed(kind, inner)
    a = torch.randint(-127, 128, (3, inner), dtype=torch.int8)
    integers = packed_dense.integers_of(few_bits.unpack(words, 24, inner, BITS[kind]), kind).to(torch.int8)
    of_packed = PackedWeight(words, torch.ones(24), None, None, kind, BITS[kind], 24)
    assert torch.equal(integers, weight)
    assert torch.equal(product(a, integers), of_packed.integer_sums(a))


@pytest.mark.parametrize("kind", [*BITS, "weight_only"])
def test_no_call_of_a_kernel_of_the_cpu_is_left(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, as on a GPU."""

    def called(*_: object) -> Tensor:
        raise AssertionError("a kernel of the CPU was called")

    monkeypatch.setattr(packed_dense, "integer_product", called)
    monkeypatch.setattr(packed_dense, "float_product", called)
    _, words = packed("int8" if kind == "weight_only" else kind, 64)
    scale = torch.ones(2, 1, 16) if kind == "weight_only" else torch.ones(24)
    x = torch.randn(32, 64)
    settings = (None, None, kind, BITS.get(kind, 8), 24)
    with pytest.raises(AssertionError, match="a kernel of the CPU"):
        PackedDense(x, PackedWeight(words, scale, *settings), None, 0.0).forward()
    on_meta = PackedWeight(words.to("meta"), scale.to("meta"), *settings)
    y = PackedDense(x.to("meta"), on_meta, None, 0.0).forward()
    assert y.shape == (32, 24)
