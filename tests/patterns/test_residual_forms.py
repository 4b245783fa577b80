"""The residual sum as vision models write it: drop path, layer scale, parallel branches, channels first, GroupNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.patterns import spellings
from fuse_pass.report import Reason
from tests.capture import Captured, capture
from tests.patterns.truth import SEED, assert_fused_like_eager, fused, leaves, with_grads

example_inputs = spellings.dropout_norm.CORPUS.example_inputs


def timm_drop_path(x: Tensor, keep: float = 0.8) -> Tensor:
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    mask.div_(keep)
    return x * mask


def transformers_drop_path(x: Tensor, keep: float = 0.8) -> Tensor:
    mask = keep + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype)
    mask.floor_()
    return x.div(keep) * mask


def two_blocks(drop_path: Any) -> Any:
    """The mask of the second branch is drawn between the first sum and its norm."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        first, second = r + drop_path(x), r + drop_path(x * 2)
        return F.layer_norm(first, (24,), w, b) + F.layer_norm(second, (24,), w, b) + first

    return function


def assert_like_the_unfused_graph(function: Any, count: int) -> Captured:
    """PyTorch's own random numbers stay in these graphs: the captured one draws the same from the same state."""
    inputs = example_inputs(torch.float64)
    found, ours = fused(function, leaves(inputs))
    assert found.report.counts() == {"dropout_norm": count}, str(found.report)
    original = found.originals[0]
    names = [node.name.removeprefix("l_").rstrip("_") for node in original.graph.find_nodes(op="placeholder")]

    def unfused(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        given = {"x": x, "r": r, "w": w, "b": b}
        torch.manual_seed(SEED)
        return original(*(given[name] for name in names))

    theirs = with_grads(unfused, leaves(inputs))
    for a, b in zip(ours.values + ours.grads, theirs.values + theirs.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    return found


@pytest.mark.parametrize("drop_path", [timm_drop_path, transformers_drop_path])
def test_drop_path(drop_path: Any) -> None:
    found = assert_like_the_unfused_graph(two_blocks(drop_path), 2)
    assert found.report.declines == []


def layer_scale(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = r + b * F.dropout(x, 0.25)
    return F.layer_norm(z, (24,), w, b) + z


def layer_scale_first(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(torch.mul(x, b) + r, (24,), w, b)


def parallel_branches(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = r + torch.tanh(x) + F.dropout(x, 0.25)
    return F.layer_norm(z, (24,), w, b) + z


def parallel_branches_dropped_first(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Phi: the sum of two dropped branches, then the stream."""
    return F.layer_norm(F.dropout(x, 0.25) + torch.sin(x) + r, (24,), w, b)


@pytest.mark.parametrize("function", [layer_scale, layer_scale_first, parallel_branches_dropped_first])
def test_a_dropout_below_the_last_sum_is_left_to_inductor(function: Any) -> None:
    found = assert_like_the_unfused_graph(function, 1)
    assert "dropout" not in found.report.matches[0].variant


def test_the_last_of_parallel_branches_is_dropped_inside() -> None:
    found = assert_fused_like_eager(parallel_branches, example_inputs(), counts={"dropout_norm": 1})
    assert "dropout" in found.report.matches[0].variant


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_every_norm_of_one_sum(p: float) -> None:
    """GPT-NeoX norms the stream for attention and feed-forward, a scene-text reader for each of its decoders."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = r + F.dropout(x, p) + torch.sin(x)
        return F.layer_norm(z, (24,), w) * F.rms_norm(z, (24,), b) + F.layer_norm(z.view(-1, 24), (24,), b).view_as(z)

    found = assert_fused_like_eager(function, example_inputs(), counts={"dropout_norm": 3}) if p == 0 else None
    if found is None:
        found = assert_like_the_unfused_graph(function, 3)
    assert found.report.declines == []
    assert [match.variant.count("another of one sum") for match in found.report.matches] == [0, 1, 1]


def test_every_norm_of_one_dropout() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = F.dropout(x, 0.25)
        return F.layer_norm(z, (24,), w) * F.layer_norm(z, (24,), b) + r

    assert_fused_like_eager(function, example_inputs(), counts={"dropout_norm": 2})


# --- recognised, but not worth it


def images(c: int = 6) -> dict[str, Any]:
    x, r = (torch.randn(2, c, 4, 3, requires_grad=True) for _ in range(2))
    return {"x": x, "r": r, "w": torch.randn(c, requires_grad=True), "b": torch.randn(c, requires_grad=True)}


def channels_last(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm((x + r).permute(0, 2, 3, 1), (6,), w, b).permute(0, 3, 1, 2)


def flattened(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm((x + r).flatten(2).transpose(1, 2), (6,), w, b)


def group_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.group_norm(x + r, 2, w, b)


def written_out_over_channels(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = x + r
    mean = z.mean(1, keepdim=True)
    variance = (z - mean).pow(2).mean(1, keepdim=True)
    return w[:, None, None] * ((z - mean) / torch.sqrt(variance + 1e-6)) + b[:, None, None]


def inactive_dropout(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(F.dropout(x * 2, 0.5, False).permute(0, 2, 3, 1), (6,), w, b) + r.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    "function", [channels_last, flattened, group_norm, written_out_over_channels, inactive_dropout]
)
def test_norms_over_channels_are_recognised_and_cost_too_much(function: Any) -> None:
    found = assert_fused_like_eager(function, images(), counts={})
    assert [decline.reason for decline in found.report.declines] == [Reason.COST]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, r, w, b: F.group_norm(torch.sin(x) * r, 2, w, b),
        lambda x, r, w, b: F.layer_norm(torch.sin(x).permute(0, 2, 3, 1), (6,), w, b),
    ],
)
def test_without_a_sum_there_is_nothing_to_recognise(function: Any) -> None:
    report = capture(function, *images().values()).report
    assert report.matches == []
    assert report.declines == []
