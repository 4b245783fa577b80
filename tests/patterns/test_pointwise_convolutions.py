"""1×1 convolutions as Linear layers: fused in every layout in which that pays, declined for cost in the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.report import Reason
from tests.patterns.truth import assert_agrees, assert_declines, assert_fused_like_eager, eager, fused, leaves

CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
CHANNELS_LAST = {"memory_format": torch.channels_last}


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    conv: Any = CONVS[x.dim()]
    return conv(F.gelu(conv(x, w1, b1)), w2, b2)  # type: ignore[no-any-return]


def inputs(x: Tensor, groups: int = 1) -> dict[str, Any]:
    ones = (1,) * (x.dim() - 2)
    values = {
        "x": x,
        "w1": torch.randn(24, x.shape[1] // groups, *ones),
        "b1": torch.randn(24),
        "w2": torch.randn(16, 24, *ones),
        "b2": torch.randn(16),
    }
    return {name: value.to(x.dtype).requires_grad_() for name, value in values.items()}


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "1d": lambda: torch.randn(3, 8, 40),
    "2d": lambda: torch.randn(3, 8, 5, 6),
    "3d": lambda: torch.randn(3, 8, 5, 6, 2),
    "one image": lambda: torch.randn(1, 8, 9, 9),
    "one row": lambda: torch.randn(3, 8, 1, 40),
    "channels_last": lambda: torch.randn(3, 8, 5, 6).to(**CHANNELS_LAST),  # type: ignore[call-overload]
    "channels_last in bfloat16": lambda: torch.randn(3, 8, 5, 6).bfloat16().to(**CHANNELS_LAST),  # type: ignore[call-overload]
    "float64, channels_last": lambda: torch.randn(3, 8, 5, 6).double().to(**CHANNELS_LAST),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(make: Callable[[], Tensor], dynamic: bool) -> None:
    torch.manual_seed(0)
    x = make()
    found = assert_fused_like_eager(mlp, inputs(x), counts={"dense_act_dense": 1}, dynamic=dynamic)
    assert found.report.declines == []
    assert "1×1 convolutions" in found.report.matches[0].variant
    assert found.output.stride() == mlp(*inputs(x).values()).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_sequence(dtype: torch.dtype) -> None:
    """`[B, L, C]` data, which no copy brings to the op."""

    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return mlp(x.transpose(1, 2), w1, b1, w2, b2).transpose(1, 2)

    values = inputs(torch.randn(3, 8, 40, dtype=dtype))
    values["x"] = torch.randn(3, 40, 8, dtype=dtype).requires_grad_()
    assert_fused_like_eager(function, values, counts={"dense_act_dense": 1})


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "no biases": lambda x, w1, b1, w2, b2: F.conv2d(F.gelu(F.conv2d(x, w1)), w2),
    "inactive dropout": lambda x, w1, b1, w2, b2: F.conv2d(F.dropout(F.gelu(F.conv2d(x, w1, b1)), 0.25, False), w2, b2),
    "relu in place": lambda x, w1, b1, w2, b2: F.conv2d(F.relu(F.conv2d(x, w1, b1), inplace=True), w2, b2),
    "written out": lambda x, w1, b1, w2, b2: F.conv2d((lambda h: h * h.sigmoid())(F.conv2d(x, w1, b1)), w2, b2),
    "settings": lambda x, w1, b1, w2, b2: F.conv2d(F.gelu(F.conv2d(x, w1, b1, 1, "same", 3)), w2, b2, (1, 1), 0, 2, 1),
    "sliced weight": lambda x, w1, b1, w2, b2: F.conv2d(F.gelu(F.conv2d(x, w1[3:9], b1[3:9])), w2[:, 3:9], b2),
    "contiguous": lambda x, w1, b1, w2, b2: F.conv2d(F.gelu(F.conv2d(x, w1, b1)).contiguous(), w2, b2),
}


@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(function: Callable[..., Tensor]) -> None:
    found = assert_fused_like_eager(function, inputs(torch.randn(3, 8, 5, 6)), counts={"dense_act_dense": 1})
    assert found.report.declines == []
    with torch.no_grad():
        assert_fused_like_eager(function, inputs(torch.randn(3, 8, 5, 6)), counts={"dense_act_dense": 1})


def test_dropout_between() -> None:
    """The mask is counted pixel by pixel, so eager is shown the channels last."""

    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.conv2d(F.dropout(F.gelu(F.conv2d(x, w1, b1)), 0.25), w2, b2)

    def pixelwise(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        a = F.dropout(F.gelu(F.conv2d(x, w1, b1)).movedim(1, -1), 0.25)
        return F.conv2d(a.movedim(-1, 1), w2, b2)

    values = inputs(torch.randn(3, 8, 5, 6))
    found, ours = fused(function, leaves(values))
    assert found.report.counts() == {"dense_act_dense": 1}
    assert_agrees(ours, eager(pixelwise, leaves(values)), eager(pixelwise, leaves(values, torch.float64)))


def test_chain_of_three() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.conv2d(F.silu(mlp(x, w1, b1, w2, b2)), w2.transpose(0, 1))

    found = assert_fused_like_eager(function, inputs(torch.randn(3, 8, 5, 6)), counts={"dense_act_dense": 2})
    assert len(found.calls("act_dense")) == 1


OTHERS: dict[str, Callable[..., Tensor]] = {
    "stride": lambda x, w1, b1, w2, b2: F.conv2d(F.gelu(F.conv2d(x, w1, b1, stride=2)), w2, b2),
    "padding": lambda x, w1, b1, w2, b2: F.conv2d(F.gelu(F.conv2d(x, w1, b1)), w2, b2, padding=1),
    "kernel of three": lambda x, w1, b1, w2, b2: F.conv2d(F.gelu(F.conv2d(x, w1.expand(-1, -1, 3, 3), b1)), w2, b2),
    "transposed convolution": lambda x, w1, b1, w2, b2: F.conv2d(
        F.gelu(F.conv_transpose2d(x, w1.transpose(0, 1), b1)), w2, b2
    ),
    "batch norm between": lambda x, w1, b1, w2, b2: F.conv2d(
        F.gelu(F.batch_norm(F.conv2d(x, w1), None, None, b1, b1, True)), w2, b2
    ),
    "a Linear behind": lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.conv2d(x, w1, b1)), w2[:, :6].flatten(1)),
}


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS)
def test_other_convolutions_are_no_linear(function: Callable[..., Tensor]) -> None:
    found = assert_fused_like_eager(function, inputs(torch.randn(3, 8, 5, 6)), counts={})
    assert found.rewritten[0] is found.originals[0]


def test_unbatched_image_is_no_batch_of_rows() -> None:
    found = assert_fused_like_eager(
        lambda x, *rest: F.conv2d(F.gelu(F.conv2d(x[0], *rest[:2])), *rest[2:]),
        inputs(torch.randn(3, 8, 9, 9)),
        counts={},
    )
    assert found.report.declines == []


@pytest.mark.parametrize("which", ["first", "second"])
def test_grouped_convolutions_cost_more(which: str) -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        if which == "first":
            return F.conv2d(F.gelu(F.conv2d(x, w1[:, :4], b1, groups=2)), w2, b2)
        return F.conv2d(F.gelu(F.conv2d(x, w1, b1)), w2[:, :6], b2, groups=4)

    assert_declines(function, inputs(torch.randn(3, 8, 5, 6)), Reason.COST, "conv2d")


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(3, 8, 1, 1), id="squeeze and excite"),
        pytest.param(torch.randn(3, 8, 7, 9, dtype=torch.bfloat16), id="contiguous half precision"),
        pytest.param(torch.randn(70, 8, 1, 1), id="strides that are both layouts"),
    ],
)
def test_layouts_that_cost_more(x: Tensor) -> None:
    assert_declines(mlp, inputs(x.detach()), Reason.COST, "conv2d")


def test_second_reader() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
        a = F.gelu(F.conv2d(x, w1, b1))
        return F.conv2d(a, w2, b2), a

    assert_declines(function, inputs(torch.randn(3, 8, 5, 6)), Reason.SECOND_READER, "a")


def test_pixels_that_change_places() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.conv2d(F.gelu(F.conv2d(x, w1, b1)).reshape(x.shape[0], -1, 6, 5), w2, b2)

    (decline,) = assert_declines(function, inputs(torch.randn(3, 8, 5, 6)), Reason.LAYOUT, "reshape")
    assert "shape" in decline.detail


# --- a Linear behind images of one pixel ------------------------------------------------------------------------------

FLATTENINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda h: h.flatten(1),
    "view": lambda h: h.view(h.size(0), -1),
    "squeeze": lambda h: h.squeeze(-1).squeeze(-1),
    "dropout": lambda h: F.dropout(h.flatten(1), 0.2, False),
}


def head(flattened: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        return F.linear(flattened(F.hardswish(F.conv2d(pooled, w1, b1))), w2.flatten(1), b2)

    return function


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("flattened", FLATTENINGS.values(), ids=FLATTENINGS)
def test_a_linear_behind_images_of_one_pixel(flattened: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    values = inputs(torch.randn(70, 8, 3, 3))
    found = assert_fused_like_eager(head(flattened), values, counts={"dense_act_dense": 1}, dynamic=dynamic)
    assert found.report.matches[0].variant == "hardswish, 1×1 convolutions"
    with torch.no_grad():
        assert_fused_like_eager(head(flattened), values, counts={"dense_act_dense": 1}, dynamic=dynamic)


def test_a_few_images_of_one_pixel() -> None:
    assert_declines(head(FLATTENINGS["flatten"]), inputs(torch.randn(5, 8, 3, 3)), Reason.COST, "linear")


def test_a_linear_that_mixes_pixels() -> None:
    def classifier(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.relu(F.conv2d(x, w1, b1)).flatten(1), w2.flatten(1).repeat(1, 9), b2)

    found = assert_fused_like_eager(classifier, inputs(torch.randn(70, 8, 3, 3)), counts={})
    assert found.report.declines == []


def test_images_that_become_features() -> None:
    """As many numbers, but of 70 images: no flattening."""

    def turned(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.relu(F.conv2d(x, w1, b1))
        return F.linear(h.reshape(24, 70), w2.flatten(1).repeat(1, 3)[:, :70], b2)

    assert_declines(turned, inputs(torch.randn(70, 8, 1, 1)), Reason.LAYOUT, "reshape")
