"""`nn.MultiheadAttention` opened for the sake of its projections: PyTorch's own results, products by `dense`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fuse_pass.backend import FuseBackend
from fuse_pass.report import Reason
from tests.capture import Captured, capture, costs, everything_pays, nothing_pays
from tests.patterns.attention_forms import every_form
from tests.patterns.truth import assert_fused_like_eager
from tests.quantization.samples import Sample


@pytest.fixture(autouse=True)
def every_linear_pays(costs_of_no_machine: None) -> Iterator[None]:
    with costs(everything_pays):
        yield


def calls_left(found: Captured) -> int:
    graphs = [m.graph for gm in found.rewritten for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
    return sum(len(g.find_nodes(op="call_function", target=F.multi_head_attention_forward)) for g in graphs)


def as_function(layer: nn.Module, *inputs: Tensor, **options: Any) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """The layer as a function of tensors, its parameters included, and those; one input is query, key and value."""
    names, count = [name for name, _ in layer.named_parameters()], len(inputs)

    def call(*tensors: Tensor) -> Any:
        x, parameters = tensors[:count], dict(zip(names, tensors[count:], strict=True))
        same_dtype = {
            name: value.to(x[0].dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in options.items()
        }
        found = torch.func.functional_call(layer, parameters, x if count == 3 else x * 3, same_dtype)
        return tuple(result for result in found if result is not None)

    return call, {**{f"x{i}": x for i, x in enumerate(inputs)}, **dict(layer.named_parameters())}


@every_form
def test_every_form(form: Sample) -> None:
    found = assert_fused_like_eager(*as_function(form.layer(), *form.inputs(), **form.call))
    assert calls_left(found) == 0
    assert found.report.counts()["dense"] >= 2
    assert found.report.declines == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_self_attention_keeps_its_one_merged_product(dynamic: bool) -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 5, 8, requires_grad=True)
    found = assert_fused_like_eager(*as_function(layer, x, need_weights=False), dynamic=dynamic)
    assert {match.variant for match in found.report.matches} == {"8 → 24", "8 → 8"}


def test_what_does_not_pay_stays_one_call() -> None:
    layer, x = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)
    with costs(nothing_pays):
        found = capture(lambda x: layer(x, x, x)[0], x)
    assert found.rewritten[0] is found.originals[0]
    assert (found.report.matches, found.report.declines) == ([], [])


def test_one_of_two_pays() -> None:
    layer, short, long = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8), torch.randn(15, 2, 8)
    with costs(lambda problem: problem.sizes[0] > 20):
        found = capture(lambda a, b: layer(a, a, a)[0].sum() + layer(b, b, b)[0].sum(), short, long)
    assert calls_left(found) == 1
    assert found.report.counts() == {"dense": 2}


def test_without_dense_it_stays_one_call() -> None:
    layer, x = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)
    backend = FuseBackend([name for name in FuseBackend().options.patterns if name != "dense"], strict=True)
    assert calls_left(capture(lambda x: layer(x, x, x)[0], x, backend=backend)) == 1


def test_autocast() -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = capture(lambda x: layer(x, x, x), x), layer(x, x, x)
    assert found.report.counts() == {"dense": 2}
    for ours, theirs in zip(found.output, expected, strict=True):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_operations_know_whether_they_have_gradients() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    for needed in (True, False):
        with torch.set_grad_enabled(needed):
            found = capture(lambda x: layer(x, x, x)[0], x)
        products = [node.meta["example_value"].requires_grad for node in found.calls("dense")]
        assert products == [needed, needed]


def test_inside_checkpoint() -> None:
    function, inputs = as_function(nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8, requires_grad=True))
    found = assert_fused_like_eager(lambda *tensors: checkpoint(function, *tensors, use_reentrant=False), inputs)
    assert calls_left(found) == 0
    assert found.report.counts() == {"dense": 2}


# --- what stays -------------------------------------------------------------------------------------------------------


def the_decline(found: Captured) -> tuple[Reason, str]:
    assert calls_left(found) == 1
    (decline,) = found.report.declines
    assert decline.pattern == "dense"
    return decline.reason, decline.detail


def test_a_dropout_that_is_known_at_run_time_only() -> None:
    layer, x = nn.MultiheadAttention(8, 2, dropout=0.3), torch.randn(5, 2, 8)
    found = capture(lambda x: layer(x, x, x)[0], x, dynamic=True)
    assert the_decline(found) == (Reason.CONSTANTS, "dropout_p is known at run time only")
    layer.eval()
    assert calls_left(capture(lambda x: layer(x, x, x)[0], x, dynamic=True)) == 0


def test_under_vmap() -> None:
    layer, x = nn.MultiheadAttention(8, 2), torch.randn(3, 5, 2, 8)
    found = capture(torch.func.vmap(lambda x: layer(x, x, x, need_weights=False)[0]), x)
    assert the_decline(found)[0] is Reason.FUNCTORCH


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_random_numbers_are_drawn_as_without_us(need_weights: bool) -> None:
    """Eager's, for who asked for them."""
    layer = nn.MultiheadAttention(16, 4, dropout=0.4, batch_first=True)
    x = torch.randn(2, 6, 16)
    results = []
    for backend in ("inductor", FuseBackend(["dense"], strict=True)):
        torch._dynamo.reset()
        torch.manual_seed(3)
        compiled = torch.compile(
            lambda x: layer(x, x, x, need_weights=need_weights),
            backend=backend, fullgraph=True, options={"fallback_random": True},
        )  # fmt: skip
        y, weights = compiled(x)
        layer.zero_grad()
        y.square().sum().backward()
        results.append([y, *([weights] if need_weights else []), *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    undropped = layer.eval()(x, x, x, need_weights=need_weights)[0]
    assert not torch.allclose(results[1][0], undropped, rtol=1e-2, atol=1e-2)
