"""Dropouts that no pattern takes: drawn by our generator, exact in probability, kept nowhere, reproducible."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node
from torch.utils.checkpoint import checkpoint

from fuse_pass.backend import fuse_backend

P = 0.1


class Compiled(CustomGraphPass):
    """Notes the graphs that are compiled: of a training step the forward comes first."""

    def __init__(self) -> None:
        self.graphs: list[list[Node]] = []

    def __call__(self, graph: Graph) -> None:
        self.graphs.append(list(graph.nodes))

    def uuid(self) -> Any:
        return None  # compile anew each time, or there is nothing to see

    def stock_draws(self) -> int:
        return sum("inductor_random" in str(node.target) for graph in self.graphs for node in graph)

    def kept(self) -> list[Tensor]:
        values = [node.meta["val"] for node in self.graphs[0][-1].all_input_nodes]
        return [value for value in values if isinstance(value, Tensor)]


class Beside(nn.Module):
    """Something that is fused, and a function of x with dropouts that are not."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.function = nn.LayerNorm(8), function

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(x), self.norm(y + y)


def run(
    function: Callable[[Tensor], Tensor], x: Tensor, seed: int = 0, **options: Any
) -> tuple[Tensor, Tensor, Compiled]:
    """The function's value, the gradient of its sum, and the graphs."""
    compiled = Compiled()
    options = {"post_grad_custom_post_pass": compiled, **options}
    call = torch.compile(Beside(function), backend=fuse_backend, options=options)
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    result = call(x, torch.ones(3, 8))[0]
    result.sum().backward()
    assert x.grad is not None
    return result.detach(), x.grad, compiled


def dropout(x: Tensor) -> Tensor:
    return F.dropout(x, P)


def probabilities(x: Tensor) -> Tensor:
    """Attention of which the dropped probabilities can be seen."""
    return F.scaled_dot_product_attention(x, x, torch.eye(x.shape[-2]).expand(*x.shape[:-1], -1), dropout_p=P)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(640, 333), (7, 1, 300, 100), (200_001,)], ids=str)
def test_what_is_kept_is_scaled_and_the_rest_is_zero(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    y, grad, compiled = run(dropout, torch.ones(shape, dtype=dtype))
    scale = torch.tensor(1 / (1 - P), dtype=dtype).item()
    assert set(y.unique().tolist()) == {0.0, scale}
    assert torch.equal(y, grad), "backward has another mask"
    n = y.numel()
    dropped = (y == 0).sum().item()
    assert abs(dropped - n * P) < 5 * math.sqrt(n * P * (1 - P))
    assert compiled.stock_draws() == 0
    assert all(value.is_floating_point() or value.dim() < 2 for value in compiled.kept()), "a mask is stored"


def test_masks_inside_attention() -> None:
    x = torch.randn(2, 3, 50, 50)
    dropped, grad, compiled = run(probabilities, x)
    exact = probabilities_without_dropout(x)
    kept = dropped != 0
    assert 0.85 < kept.float().mean() < 0.95
    torch.testing.assert_close(dropped[kept], (exact / (1 - P))[kept], rtol=1e-5, atol=1e-8)
    leaf = x.clone().requires_grad_()
    (probabilities_without_dropout(leaf) * kept / (1 - P)).sum().backward()
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-6)
    assert compiled.stock_draws() == 0


def probabilities_without_dropout(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT / math.sqrt(x.shape[-1]), -1)


def test_seeds() -> None:
    x = torch.ones(64, 64)
    two = lambda x: torch.stack((F.dropout(x, 0.5), F.dropout(x, 0.5)))  # noqa: E731
    (first, second), again, other = run(two, x, 1)[0], run(two, x, 1)[0], run(two, x, 2)[0]
    assert torch.equal(again, torch.stack((first, second)))
    for a, b in ((first, second), (first, other[0])):
        assert abs((a == b).float().mean() - 0.5) < 0.05


def test_inside_activation_checkpointing() -> None:
    y, grad, compiled = run(lambda x: checkpoint(dropout, x, use_reentrant=False), torch.ones(64, 64))
    assert torch.equal(y, grad), "the second forward has another mask"
    assert compiled.stock_draws() == 0


def test_sizes_that_change() -> None:
    call = torch.compile(Beside(dropout), backend=fuse_backend, dynamic=True)
    for rows in (300, 501):
        y = call(torch.ones(rows, 77), torch.ones(3, 8))[0]
        assert y.shape == (rows, 77)
        assert abs((y == 0).float().mean() - P) < 0.02


def test_no_elements() -> None:
    assert run(dropout, torch.ones(0, 4))[0].shape == (0, 4)


def test_a_single_number_is_left_alone() -> None:
    assert run(dropout, torch.tensor(2.0))[0].item() in (0.0, pytest.approx(2 / (1 - P)))


def test_random_numbers_of_the_user_are_left_alone() -> None:
    y, _, compiled = run(lambda x: torch.where(torch.rand(64, 64) > P, x, 0.0), torch.ones(64, 64))
    assert 0.8 < y.mean() < 1
    assert compiled.stock_draws() == 1


def test_eager_s_random_numbers_are_left_to_who_asked_for_them() -> None:
    x = torch.ones(64, 64)
    y, _, _ = run(dropout, x, 3, fallback_random=True)
    torch.manual_seed(3)
    assert torch.equal(y, dropout(x))
