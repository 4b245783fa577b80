"""Every op of ours in aten operations alone: none is left, and the numbers are those of the op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fuse_pass
from fuse_pass.kernels import few_bits
from fuse_pass.ops import library
from tests.packed import packed_format

ops = torch.ops.fuse_pass
FP8_E4M3 = packed_format(4, 3, 7, "finite", "nearest", True, "saturate")
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Calls(TorchDispatchMode):
    """Writes down every call of an op of ours, those of backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, list[Call]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fuse_pass":
            self.of.setdefault(op.name().partition("::")[2], []).append((args, kwargs or {}))
        return op(*args, **(kwargs or {}))


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def steps(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def codes(bits: int, columns: int, inner: int) -> Tensor:
    return few_bits.pack(torch.randint(0, 2**bits, (columns, inner)), bits)


def packed_weights() -> list[tuple[Any, ...]]:
    """`(words, scale, shift, table, kind, bits, columns)` of every kind; 37 columns of x are not a whole word."""
    per_column, per_group = torch.rand(24), few_bits.pack_columns(torch.rand(24, 1))
    table = torch.linspace(-1, 1, 16)
    return [
        (codes(8, 24, 37), per_column, None, None, "int8", 8, 24),
        (codes(8, 24, 37), per_column, None, None, "llm_int8", 8, 24),
        (codes(2, 24, 37), per_column, None, None, "b1.58", 2, 24),
        (codes(1, 24, 37), per_column, None, None, "b1", 1, 24),
        (codes(4, 24, 37), per_group, per_group / 2, table, "weight_only", 4, 24),
    ]


def fused_layers() -> None:
    seed, act = ops.seed(device=torch.device("cpu")), ("gelu", [])
    ops.taken_seed(seed, device=torch.device("cpu"))
    w1, b1, w2, b2, up = floats(40, 16), floats(40), floats(12, 40), floats(12), floats(40, 16)
    x = floats(3, 5, 16)
    ops.dense_act_dense(x, w1, b1, w2, b2, None, seed, 0.3, *act, FP8_E4M3, [], FP8_E4M3)[0].sum().backward()
    ops.gated_dense(x, w1, b1, up, b1, w2, b2, seed, 0.3, "silu", [], False)[0].sum().backward()
    ops.act_dense(floats(3, 40), w2, b2, None, seed, 0.3, *act).sum().backward()
    ops.dense(x, w1, b1).sum().backward()
    y, z, _ = ops.dropout_norm(
        x, floats(3, 5, 16), floats(16), floats(16), seed, 0.3, 1e-5, 1, "layer_norm", None, True
    )
    (y.sum() + z.square().sum()).backward()
    with torch.no_grad():
        ops.dense_act_dense_inference(x, w1, b1, w2, b2, None, None, 0.0, *act)
        ops.gated_dense_inference(x, w1, b1, up, b1, w2, b2, None, 0.0, "silu", [], False)
        for prepack_or_not in (ops.dense_act, ops.dense_prepacked):
            prepack_or_not(x, w1, b1, *act)


def products() -> None:
    a, b, bias = torch.randn(6, 37), torch.randn(24, 37), torch.randn(24)
    with torch.no_grad():
        for gemm in (ops.gemm, ops.gemm_prepacked):
            gemm(a, b, bias, "none", [], "")
            gemm(a, b, None, "gelu", [], "tanh")
    ops.int8_product(steps(6, 37), steps(24, 37))
    ops.int8_product(torch.full((2, 3000), 127, dtype=torch.int8), torch.full((3, 3000), 127, dtype=torch.int8))
    ops.integer_product(
        torch.full((2, 3000), -127, dtype=torch.int8), few_bits.pack(torch.full((3, 3000), 255), 8), 3, 8
    )
    for words, scale, shift, table, kind, bits, columns in packed_weights():
        if kind == "weight_only":
            ops.float_product(torch.randn(6, 40), words, table, scale, shift, columns, bits)
        else:
            ops.integer_product(steps(6, 37), words, columns, bits)
    words, scale, *_ = packed_weights()[0]
    ops.outlier_product(torch.where(torch.arange(37) % 7 == 0, torch.randn(6, 37), 0.0), words, scale)


def low_precision() -> None:
    x, bias = 4 * torch.randn(3, 5, 37), floats(24)
    for weight in packed_weights():
        ops.packed_dense(x.clone().requires_grad_(), *weight, bias, 6.0).sum().backward()
    zero, sums = torch.randint(0, 255, (24,), dtype=torch.int32), torch.randint(-9, 9, (24,), dtype=torch.int32)
    weight = (codes(8, 24, 37), torch.rand(24), zero, sums, 8, 24)
    how = (-128, 127, "nearest", True)
    ops.quantized_dense(x.clone().requires_grad_(), torch.tensor(0.1), None, *weight, bias, *how).sum().backward()
    image, windows = floats(2, 4, 7, 6), ([3, 2], [2, 1], [1, 0, 1, 1], [1, 2])
    for groups, inner in ((1, 24), (2, 12)):
        of_conv = (codes(8, 6, inner), torch.rand(6), zero[:6], sums[:6], 8, 6)
        ops.quantized_conv2d(
            image, torch.tensor(0.1), None, *of_conv, floats(6), *how, *windows, groups
        ).sum().backward()
    for threshold in (0.0, 6.0):
        ops.llm_int8_linear(x.clone().requires_grad_(), floats(24, 37), None, bias, threshold, "gelu").sum().backward()
    for variant in ("b1", "b1.58"):
        layer = fuse_pass.BitLinear(37, 24, variant=variant)
        layer(x.clone().requires_grad_()).sum().backward()
        layer.pack()(x.clone().requires_grad_()).sum().backward()


def fake_quantisation() -> None:
    seed = ops.seed(device=torch.device("cpu"))
    for rounding in ("nearest", "stochastic"):
        given = None if rounding == "nearest" else seed
        ops.fake_quantize(floats(6, 7), given, 4, 3, 7, "ieee", rounding, True, "saturate", True).sum().backward()
        ops.straight_through(floats(6, 7), torch.randn(6, 7), torch.randn(6, 7), -1.0, 1.0).sum().backward()
        ops.fake_quantize_int(floats(6, 7), torch.tensor(0.1), None, given, -8, 7, rounding, True).sum().backward()


@functools.cache
def calls() -> dict[str, list[Call]]:
    torch.manual_seed(0)
    with Calls() as found:
        for scenario in (fused_layers, products, low_precision, fake_quantisation):
            scenario()
    return found.of


NAMES = sorted(op.name().partition("::")[2] for op in library.in_aten())


def test_every_op_is_tried_here() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fuse_pass::")}
    assert {f"fuse_pass::{name}" for name in NAMES} == registered, "the table has every op"
    assert sorted(calls()) == NAMES, "a new op wants a call of its own above"


@pytest.mark.parametrize("name", NAMES)
def test_aten_alone_gives_the_numbers_of_the_op(name: str) -> None:
    op: Callable[..., Any] = getattr(ops, name).default
    for args, kwargs in calls()[name]:

        def call(*args: Any, kwargs: Any = kwargs) -> Any:
            return op(*args, **kwargs)

        with torch.no_grad():
            open_graph = make_fx(call, decomposition_table=fuse_pass.decompositions())(*args)
            targets = [node.target for node in open_graph.graph.nodes if node.op == "call_function"]
            assert {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)} <= {"aten"}
            torch.manual_seed(7)
            expected = tree_leaves(op(*args, **kwargs))
            torch.manual_seed(7)
            found = tree_leaves(open_graph(*args))
        assert len(found) == len(expected)
        for y, wanted in zip(found, expected, strict=True):
            if y.numel() and y.is_floating_point():
                torch.testing.assert_close(y, wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))
            else:
                assert torch.equal(y, wanted) or not y.numel()
