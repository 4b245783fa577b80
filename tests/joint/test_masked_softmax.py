"""Masks of attention: the rewritten graph computes the same bits, and only what is one is rewritten."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuse_pass.backend import fuse_backend
from fuse_pass.inductor import compiler
from fuse_pass.joint.masked_softmax import MaskedSoftmax

aten = torch.ops.aten
BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 4, 5, 7, 3


def captured(function: Callable[..., Any], *inputs: Tensor, mode: str = "fake") -> GraphModule:
    """The graph that Inductor's passes see, without what nobody reads."""
    gm = make_fx(function, select_decomp_table(), tracing_mode=mode)(*inputs)
    gm.graph.eliminate_dead_code()
    return gm


def rewritten(gm: GraphModule) -> GraphModule:
    """Changed in place."""
    MaskedSoftmax()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def count(gm: GraphModule, target: Any) -> int:
    return sum(node.target == target for node in gm.graph.nodes)


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    """As the attention of PyTorch without a kernel of its own."""
    return aten._safe_softmax(scores + torch.where(mask, 0.0, -math.inf), -1)


def scores_and_mask() -> tuple[Tensor, Tensor]:
    scores = torch.randn(BATCH, HEADS, QUERIES, KEYS)
    scores[0, 1, 2, 3] = math.nan
    scores[1, 0, 1, 2] = math.inf
    mask = torch.rand(BATCH, 1, QUERIES, KEYS) < 0.6
    mask[1, 0, 3] = False
    return scores, mask


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_rows_without_keys_are_found_by_their_maximum() -> None:
    scores, mask = scores_and_mask()
    gm = captured(masked, scores, mask)
    assert count(gm, aten.any.dim) == 1
    expected = gm(scores, mask)
    result = rewritten(gm)
    assert count(result, aten.any.dim) == 0
    assert count(result, aten.ne.Scalar) == 1
    assert torch.equal(expected[1, :, 3], torch.zeros(HEADS, KEYS)), "a row of which every key is masked"
    assert expected[0, 1, 2].isnan().all()
    assert same(result(scores, mask), expected)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((0, HEADS, QUERIES, KEYS), torch.float32), ((BATCH, HEADS, 0, KEYS), torch.float32), (None, torch.float64)],
    ids=["no batch", "no queries", "float64"],
)
def test_other_sizes_and_types(shape: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    scores, mask = scores_and_mask()
    if shape is not None:
        scores, mask = scores.new_empty(shape), mask.new_empty((shape[0], 1, *shape[2:]))
    scores = scores.to(dtype)
    gm = captured(masked, scores, mask)
    expected = gm(scores, mask)
    has_maximum = count(gm, aten.amax.default) > 0  # before torch 2.12, a softmax of no elements has none
    result = rewritten(gm)
    assert count(result, aten.any.dim) == int(not has_maximum)
    assert same(result(scores, mask), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_take_the_maximum_of_something_wider(dtype: torch.dtype) -> None:
    """Their softmax is computed in float32: the maximum is not that of the scores themselves, so `any` stays."""
    scores, mask = scores_and_mask()
    scores = scores.to(dtype)
    gm = captured(lambda s, m: aten._safe_softmax(s + torch.where(m, 0.0, -math.inf).to(dtype), -1), scores, mask)
    expected = gm(scores, mask)
    result = rewritten(gm)
    assert count(result, aten.any.dim) == 1
    assert same(result(scores, mask), expected)


def test_mask_is_stored_once() -> None:
    scores, mask = scores_and_mask()
    gm = captured(masked, scores, mask)
    result = rewritten(gm)
    (stored,) = (node for node in result.graph.nodes if node.target is compiler.STORED_ONCE)
    assert stored.args[0].target is aten.where.self
    assert stored.meta["val"].shape == mask.shape
    assert [user.target for user in stored.args[0].users] == [compiler.STORED_ONCE]


def test_sizes_that_are_not_known() -> None:
    scores, mask = scores_and_mask()
    gm = captured(masked, scores, mask, mode="symbolic")
    expected = gm(scores, mask)
    result = rewritten(gm)
    assert count(result, aten.any.dim) == 0
    assert count(result, compiler.STORED_ONCE) == 0, "nobody knows how often the mask is read"
    assert same(result(scores, mask), expected)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda s, m: s + torch.where(m.expand_as(s), 0.0, -math.inf), id="mask as large as the scores"),
        pytest.param(lambda s, m: s + torch.where(m[..., :1], 0.0, -math.inf), id="one value for all keys"),
        pytest.param(lambda s, m: s[:, :2] + torch.where(m, 0.0, -math.inf), id="two readers"),
        pytest.param(lambda s, m: s.int() + torch.where(m, 0, -9), id="integers"),
        pytest.param(lambda s, m: s.amax(-1) + (s != -math.inf).all(-1), id="all instead of any"),
        pytest.param(lambda s, m: s.amax(-1, True) + (s == -math.inf).any(-1, True), id="any that is"),
        pytest.param(lambda s, m: s.amax(-1, True) + (s == math.inf).logical_not().any(-1, True), id="infinity"),
        pytest.param(lambda s, m: s.amax(-2, True) + (s == -math.inf).logical_not().any(-1, True), id="other dim"),
        pytest.param(lambda s, m: s.amin(-1, True) + (s == -math.inf).logical_not().any(-1, True), id="minimum"),
        pytest.param(lambda s, m: (s + 1).amax(-1) + (s == -math.inf).logical_not().any(-1), id="of something else"),
        pytest.param(lambda s, m: (s == -math.inf).logical_not().any(-1) + s.amax(-1), id="maximum comes later"),
    ],
)
def test_anything_else_stays(function: Callable[..., Tensor]) -> None:
    gm = captured(function, *scores_and_mask())
    before = [node.format_node() for node in gm.graph.nodes]
    assert [node.format_node() for node in rewritten(gm).graph.nodes] == before


class Attention(nn.Module):
    """Masked attention with dropout beside a block that is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        context = F.scaled_dot_product_attention(q, k, v, mask, 0.25, is_causal=mask is None)
        y: Tensor = self.down(F.gelu(self.up(context)))
        return y


@pytest.mark.parametrize("causal", [False, True])
def test_compiled_attention_is_the_same(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Attention()
    mask = None if causal else scores_and_mask()[1]
    values = [torch.randn(BATCH, HEADS, length, WIDTH) for length in (QUERIES, KEYS, KEYS)]

    def step() -> list[Tensor]:
        torch.compiler.reset()
        inputs = [value.clone().requires_grad_() for value in values]
        torch.manual_seed(1)
        with sdpa_kernel(SDPBackend.MATH):
            y = torch.compile(model, backend=fuse_backend, options={"fx_graph_cache": False})(*inputs, mask)
        y.square().sum().backward()
        gradients = [value.grad for value in inputs if value.grad is not None]
        assert len(gradients) == 3
        return [y.detach(), *gradients]

    calls: list[int] = []
    rewrite = MaskedSoftmax.__call__
    with monkeypatch.context() as patch:
        patch.setattr(MaskedSoftmax, "__call__", lambda self, graph: calls.append(len(graph.nodes)))
        expected = step()
    assert calls, "the pass did not run"
    found: list[int] = []

    def noting(self: MaskedSoftmax, graph: torch.fx.Graph) -> None:
        rewrite(self, graph)
        found.append(sum(node.target is compiler.STORED_ONCE for node in graph.nodes))

    monkeypatch.setattr(MaskedSoftmax, "__call__", noting)
    torch.testing.assert_close(step(), expected)  # other loops: exp and sums round differently
    assert found == [1]
