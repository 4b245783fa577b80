"""Declines because of who else reads or writes: nothing fuses, the report names the cause, the result stays eager's."""

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
from tests.patterns.truth import assert_blames, assert_declines, assert_fused_like_eager

dense_inputs = spellings.dense_act_dense.CORPUS.example_inputs
norm_inputs = spellings.dropout_norm.CORPUS.example_inputs

LINEAR, GELU = F.linear, F.gelu


# --- second reader


def test_dense_hidden_value_is_an_output() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Any:
        a = GELU(LINEAR(x, w1, b1))
        return LINEAR(a, w2, b2), a

    assert_declines(function, dense_inputs(), Reason.SECOND_READER, "a")


def test_dense_activation_is_read_twice() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        a = GELU(LINEAR(x, w1, b1))
        return LINEAR(a, w2, b2) * a.sum()

    declines = assert_declines(function, dense_inputs(), Reason.SECOND_READER, "a")
    assert "also read by" in declines[0].detail


def test_dense_activation_without_a_second_linear_is_read_twice() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        a = GELU(LINEAR(x, w1, b1))
        return torch.sin(a) + torch.cos(a)

    assert_declines(function, dense_inputs(), Reason.SECOND_READER, "a")


def test_dense_hidden_value_is_also_the_second_weight() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = LINEAR(x, w1, b1)
        return LINEAR(GELU(h), h)

    assert_declines(function, dense_inputs(rows=(5,)), Reason.SECOND_READER, "h")


def test_dense_forward_hook_reads_the_middle() -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 16))
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, arguments, output: seen.append(output))
    x = torch.randn(5, 8)
    found = capture(model, x)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.SECOND_READER, "input")
    assert torch.equal(found.output, model(x))
    assert torch.equal(seen[0], seen[1])


def test_norm_sum_is_also_the_weight() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = x + r
        return F.layer_norm(z, (24,), z)

    assert_declines(function, norm_inputs(rows=()), Reason.SECOND_READER, "z")


# --- mutation


def write_add(t: Tensor) -> None:
    t.add_(1)


def write_iadd_on_an_alias(t: Tensor) -> None:
    alias = t.view(-1)
    alias += 1


def write_item(t: Tensor) -> None:
    t[..., 0] = 2.0


def write_copy(t: Tensor) -> None:
    t.copy_(t * 2)


def write_out(t: Tensor) -> None:
    torch.mul(t, 2, out=t)


def write_by_dunder(t: Tensor) -> None:
    t.__iadd__(1)


def write_by_option(t: Tensor) -> None:
    F.hardtanh(t, -0.5, 0.5, True)


def write_by_foreach(t: Tensor) -> None:
    torch._foreach_add_([t], 1)


def write_through_numpy(t: Tensor) -> None:
    array = t.detach().numpy()
    array += 1


WRITES = [
    write_add, write_iadd_on_an_alias, write_item, write_copy, write_out, write_by_dunder, write_by_option,
    write_by_foreach, write_through_numpy,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_dense_input_is_written_inside(write: Callable[[Tensor], None]) -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        x = x.clone()
        h = LINEAR(x, w1, b1)
        write(x)
        return LINEAR(GELU(h), w2, b2) + x.sum()

    with torch.no_grad():
        assert_declines(function, dense_inputs(), Reason.MUTATION, "")


@pytest.mark.parametrize("write", WRITES)
def test_norm_residual_is_written_inside(write: Callable[[Tensor], None]) -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        r = r.clone()
        z = F.dropout(x, 0.25, False) + r
        write(r)
        return F.layer_norm(z, (24,), w, b) + r

    with torch.no_grad():
        assert_declines(function, norm_inputs(), Reason.MUTATION, "")


def test_dense_weight_is_rescaled_by_an_embedding() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        w1 = w1.clone()
        h = LINEAR(x, w1, b1)
        rows = F.embedding(torch.tensor([1, 2]), w1, max_norm=0.1)
        return LINEAR(GELU(h), w2, b2) + rows.sum()

    with torch.no_grad():
        assert_declines(function, dense_inputs(), Reason.MUTATION, "rows")


def test_dense_bias_is_the_running_mean_of_a_batch_norm() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        mean = b1.clone()
        h = LINEAR(x, w1, mean)
        other = F.batch_norm(w1.T, mean, torch.ones_like(mean), training=True)
        return LINEAR(GELU(h), w2, b2) + other.sum()

    with torch.no_grad():
        assert_declines(function, dense_inputs(), Reason.MUTATION, "other")


def test_norm_dropout_in_place_on_what_others_read() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        x = x * 2
        return F.layer_norm(F.dropout(x, 1.0, True, True) + r, (24,), w, b), x

    assert_declines(function, norm_inputs(), Reason.MUTATION, "dropout")


def test_norm_sum_in_place_on_a_view() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        x = x * 2
        return F.layer_norm(x.view(x.shape).add_(r), (24,), w, b), x

    assert_declines(function, norm_inputs(), Reason.MUTATION, "add_")


def test_dense_activation_in_place_on_what_others_read() -> None:
    """There is no candidate: an in-place ReLU on a shared value is no activation that could move."""

    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Any:
        h = LINEAR(x, w1, b1)
        return LINEAR(F.relu(h, inplace=True), w2, b2), h

    found = assert_fused_like_eager(function, dense_inputs(), counts={})
    assert found.rewritten[0] is found.originals[0]


def test_dense_bias_that_the_product_is_added_into() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Any:
        b1 = b1.clone()
        alias = b1.view(-1)
        b1 += x @ w1.T
        return LINEAR(GELU(b1), w2, b2), alias * 1

    assert_fused_like_eager(function, dense_inputs(rows=()), counts={})
