"""Regions of another mode that open and close between the members of a match, and writes that none of them sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.patterns import spellings
from fuse_pass.report import Reason
from tests.capture import capture
from tests.patterns.truth import assert_blames, assert_declines, assert_fused_like_eager, leaves

dense_inputs = spellings.dense_act_dense.CORPUS.example_inputs
norm_inputs = spellings.dropout_norm.CORPUS.example_inputs


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


REGIONS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "autocast": bfloat16,
}
every_region = pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)


@every_region
def test_dense(region: Callable[[], Any]) -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.linear(x, w1, b1)
        with region():
            scale = (b2 @ b2).float() * 1
        return F.linear(F.gelu(h), w2, b2) + scale.clone()

    with torch.no_grad():
        assert_fused_like_eager(function, dense_inputs(), counts={"dense_act_dense": 1})
    if region is not torch.inference_mode:  # autograd refuses what was made in one
        assert_fused_like_eager(function, dense_inputs(), counts={"dense_act_dense": 1})


@every_region
def test_norm_whose_sum_is_read_in_the_region_first(region: Callable[[], Any]) -> None:
    """The fused op yields the sum too: it must come before the region opens, not in it."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        z = x + r
        with region():
            scale = (z[0] @ z[0].mT).float() * 1
        return F.layer_norm(z, (24,), w, b) + z, scale.clone()

    if region is not torch.inference_mode:
        assert_fused_like_eager(function, norm_inputs(), counts={"dropout_norm": 1})
    with torch.no_grad():
        assert_fused_like_eager(function, norm_inputs(), counts={"dropout_norm": 1})


def test_regions_inside_each_other() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        z = F.dropout(x, 0.25) + r
        with torch.no_grad():
            with bfloat16():
                scale = z[0] @ z[0].mT
            scale = scale.float() + z.mean()
        return F.layer_norm(z, (24,), w, b) + z, scale

    assert_fused_like_eager(function, norm_inputs(), counts={"dropout_norm": 1})


def test_two_regions_of_one_mode() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        with bfloat16():
            h = F.linear(x, w1, b1)
        scale = b2 @ b2
        with bfloat16():
            return F.linear(F.gelu(h), w2, b2) * scale

    assert_fused_like_eager(function, dense_inputs(), counts={"dense_act_dense": 1})


# --- what a region is there for


class Averaged(nn.Module):
    """Keeps a running average of what enters it, as vector quantisation and teacher networks do."""

    def __init__(self, update: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 16)
        self.average: Tensor
        self.register_buffer("average", torch.zeros(8))
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        with torch.no_grad():
            self.update(self.average, x)
        return self.down(F.gelu(h))  # type: ignore[no-any-return]


UPDATES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "lerp": lambda average, x: average.lerp_(x.mean(0), 0.1),
    "mul, add": lambda average, x: average.mul_(0.9).add_(x.mean(0), alpha=0.1),
    "copy": lambda average, x: average.copy_(0.9 * average + 0.1 * x.mean(0)),
}


def assert_like_eager(model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """Values, gradients and buffers after one step."""
    found = capture(model, x)
    assert found.report.counts() == {"dense_act_dense": 1}, str(found.report)
    expected = twin(x)
    torch.testing.assert_close(found.output, expected)
    found.output.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_running_average(update: Callable[[Tensor, Tensor], None]) -> None:
    model, twin = Averaged(update), Averaged(update)
    twin.load_state_dict(model.state_dict())
    assert_like_eager(model, twin, torch.randn(5, 8))
    assert model.average.any()


@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm(spectral_norm: Callable[[nn.Module], nn.Module]) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(spectral_norm(nn.Linear(8, 24)), nn.GELU(), spectral_norm(nn.Linear(24, 16)))

    assert_like_eager(build(), build(), torch.randn(5, 8))


# --- near misses


def test_a_write_into_what_is_read_inside_the_region() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        b2 = b2 * 1
        h = F.linear(x, w1, b1)
        with torch.no_grad():
            b2.mul_(0.9)
        return F.linear(F.gelu(h), w2, b2)

    assert_declines(function, dense_inputs(), Reason.MUTATION, "mul_")


def test_a_member_in_the_region() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        z = x + r
        with torch.no_grad():
            y = F.layer_norm(z, (24,), w, b)
        return y * z.sum()

    assert_declines(function, norm_inputs(), Reason.GRAD_MODE, "_set_grad_enabled")


def test_a_member_in_another_autocast() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            h = F.linear(x, w1, b1)
        with bfloat16():
            return F.linear(F.gelu(h), w2, b2)

    inputs = {name: value.detach() for name, value in dense_inputs().items()}
    assert_blames(capture(function, *inputs.values()).report, Reason.AUTOCAST, "_e")


def test_gradients_begin_at_the_norm() -> None:
    """Called without gradients, the sum does not say so: neither operand wants any."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        z = x + r
        early = torch.sin(z)
        with torch.enable_grad():
            y = F.layer_norm(z, (24,), w, b)
        return y, early

    x, r, w, b = leaves(norm_inputs())
    with torch.no_grad():
        found = capture(function, x.detach(), r.detach(), w, b)
    assert_blames(found.report, Reason.GRAD_MODE, "_set_grad_enabled")
    assert [value.requires_grad for value in found.output] == [True, False]


def test_gradients_end_at_the_norm() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        z = x + r
        early = torch.sin(z)
        with torch.no_grad():
            y = F.layer_norm(z, (24,), w, b)
        return y, early

    x, r, w, b = leaves(norm_inputs())
    found = capture(function, x.detach(), r.detach(), w, b)
    assert_blames(found.report, Reason.GRAD_MODE, "_set_grad_enabled")
    assert not any(value.requires_grad for value in found.output)
