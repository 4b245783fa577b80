"""Gated blocks: every way to halve a merged projection, and what is declined or is another function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.backend import FuseBackend
from fuse_pass.patterns import spellings
from fuse_pass.report import Reason
from tests.patterns.truth import assert_blames, assert_declines, assert_fused_like_eager, fused, leaves

example_inputs = spellings.gated_dense.CORPUS.example_inputs

ONLY = FuseBackend(["gated_dense"], strict=True)
WIDTH = 24


def merged_inputs(**options: Any) -> dict[str, Any]:
    """x, one weight `[48, 8]` with its bias, and the second layer."""
    values = example_inputs(**options)
    merged = {
        "weight": torch.cat([values["gate_weight"], values["up_weight"]]).detach().requires_grad_(),
        "bias": torch.cat([values["gate_bias"], values["up_bias"]]).detach().requires_grad_(),
    }
    return {"x": values["x"], **merged, "weight2": values["weight2"], "bias2": values["bias2"]}


Halves = Callable[[Tensor], tuple[Tensor, Tensor]]
HALVES: dict[str, Halves] = {
    "chunk": lambda h: h.chunk(2, -1),
    "chunk of dimension 2": lambda h: torch.chunk(h, chunks=2, dim=2),
    "split by size": lambda h: h.split(WIDTH, dim=-1),
    "split by sizes": lambda h: torch.split(h, [WIDTH, WIDTH], dim=2),
    "split by keyword": lambda h: h.split(split_size=WIDTH, dim=-1),
    "slices": lambda h: (h[..., :WIDTH], h[..., WIDTH:]),
    "slices of every dimension": lambda h: (h[:, :, :WIDTH], h[:, :, WIDTH:]),
    "slices from the end": lambda h: (h[..., :-WIDTH], h[..., -WIDTH:]),
    "slices with all bounds": lambda h: (h[..., 0:WIDTH], h[..., WIDTH : 2 * WIDTH]),
    "narrow": lambda h: (h.narrow(-1, 0, WIDTH), h.narrow(2, WIDTH, WIDTH)),
    "a chunk and a slice": lambda h: (h.chunk(2, -1)[0], h[..., WIDTH:]),
    "two chunks": lambda h: (h.chunk(2, -1)[0], h.chunk(2, -1)[1]),
}


@pytest.mark.parametrize("halves", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("gate", [0, 1])
def test_halves_of_a_merged_projection(halves: Halves, gate: int) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        parts = halves(F.linear(x, w, b))
        return F.linear(F.silu(parts[gate]) * parts[1 - gate], w2, b2)

    found = assert_fused_like_eager(function, merged_inputs(), counts={"gated_dense": 1})
    assert found.report.declines == []
    assert "merged" in found.report.matches[0].variant
    with torch.no_grad():
        found = assert_fused_like_eager(function, merged_inputs(), counts={"gated_dense": 1})
        assert len(found.calls("gated_dense_inference")) == 1


NOT_HALVES: dict[str, Halves] = {
    "one half twice": lambda h: (h.chunk(2, -1)[0], h.chunk(2, -1)[0]),
    "overlapping slices": lambda h: (h[..., :WIDTH], h[..., WIDTH - 1 : -1]),
    "every other column": lambda h: (h[..., ::2], h[..., 1::2]),
    "a quarter and a quarter": lambda h: (h.chunk(4, -1)[0], h.chunk(4, -1)[1]),
    "halves of the rows": lambda h: [p[..., :WIDTH] for p in (h[:1], h[1:2])],
    "three parts": lambda h: h.split([WIDTH - 1, WIDTH - 1, 2], -1)[:2],
    "unbound": lambda h: h.unflatten(-1, (2, WIDTH)).unbind(-2),
    "interleaved": lambda h: h.unflatten(-1, (WIDTH, 2)).unbind(-1),
}


@pytest.mark.parametrize("halves", NOT_HALVES.values(), ids=NOT_HALVES)
def test_other_parts_do_not_fuse(halves: Halves) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        gate, up = halves(F.linear(x, w, b))
        return F.linear(F.silu(gate) * up, w2[:, : up.shape[-1]], b2)

    found = assert_fused_like_eager(function, merged_inputs(), counts={}, backend=ONLY)
    assert found.rewritten[0] is found.originals[0]


def test_chunks_of_the_rows() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        gate, up = F.linear(x, w[:WIDTH], b[:WIDTH]).chunk(2, 1)
        return F.linear(F.silu(gate) * up, w2, b2)

    found = assert_fused_like_eager(function, merged_inputs(rows=(3, 4)), counts={}, backend=ONLY)
    assert found.report.declines == []


def test_parts_of_different_width() -> None:
    """The part of width 1 broadcasts over the other."""

    def function(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        gate, up = F.linear(x, w[:25], b[:25]).split([1, WIDTH], -1)
        return F.linear(F.silu(gate) * up, w2, b2)

    assert_declines(function, merged_inputs(), Reason.LAYOUT, "up", backend=ONLY)


def test_gate_and_up_of_different_width() -> None:
    def function(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, wg[:1], bg[:1])) * F.linear(x, wu, bu), w2, b2)

    assert_declines(function, example_inputs(), Reason.LAYOUT, "linear", backend=ONLY)


def separate(gate: Callable[[Tensor], Tensor], up: Callable[[Tensor], Tensor] = lambda u: u) -> Callable[..., Tensor]:
    return lambda x, wg, bg, wu, bu, w2, b2: F.linear(gate(F.linear(x, wg, bg)) * up(F.linear(x, wu, bu)), w2, b2)


OTHERS: dict[str, Callable[..., Tensor]] = {
    "no activation": separate(lambda g: g),
    "two activations": separate(F.silu, F.silu),
    "a scaled up": separate(F.silu, lambda u: u * 2),
    "PReLU": separate(lambda g: F.prelu(g, g.new_full((1,), 0.2))),
    "sum for product": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        F.silu(F.linear(x, wg, bg)) + F.linear(x, wu, bu), w2, b2
    ),
    "other inputs": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        F.silu(F.linear(x, wg, bg)) * F.linear(x + 1, wu, bu), w2, b2
    ),
    "one Linear twice": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        (lambda h: h * torch.tanh(h))(F.linear(x, wg, bg)), w2, b2
    ),
    "glu of another dimension": lambda x, wg, bg, wu, bu, w2, b2: F.linear(F.glu(F.linear(x, wg, bg), 0), w2, b2),
    "no Linear behind": lambda x, wg, bg, wu, bu, w2, b2: F.silu(F.linear(x, wg, bg)) * F.linear(x, wu, bu),
    "a norm behind": lambda x, wg, bg, wu, bu, w2, b2: F.linear(
        F.layer_norm(F.silu(F.linear(x, wg, bg)) * F.linear(x, wu, bu), (WIDTH,)), w2, b2
    ),
}


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS)
def test_other_functions_do_not_fuse(function: Callable[..., Tensor]) -> None:
    found = assert_fused_like_eager(function, example_inputs(rows=(4, 5)), counts={}, backend=ONLY)
    assert found.rewritten[0] is found.originals[0]


@pytest.mark.parametrize("which", ["gate", "activation", "up", "product"])
def test_second_reader(which: str) -> None:
    def function(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Any:
        gate, up = F.linear(x, wg, bg), F.linear(x, wu, bu)
        activation = F.silu(gate)
        product = activation * up
        read = {"gate": gate, "activation": activation, "up": up, "product": product}[which]
        return F.linear(product, w2, b2), read.sum()

    assert_declines(function, example_inputs(), Reason.SECOND_READER, "", backend=ONLY)


def test_second_reader_of_a_merged_projection() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Any:
        h = F.linear(x, w, b)
        gate, up = h.chunk(2, -1)
        return F.linear(F.silu(gate) * up, w2, b2), h.sum()

    assert_declines(function, merged_inputs(), Reason.SECOND_READER, "h", backend=ONLY)


def test_cast_of_the_product() -> None:
    def function(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        product = F.silu(F.linear(x, wg, bg)).float() * F.linear(x, wu, bu).float()
        return F.linear(product.to(x.dtype), w2, b2)

    assert_declines(function, example_inputs(torch.bfloat16), Reason.DTYPES, "", backend=ONLY)


def test_written_out_gate_with_another_constant() -> None:
    gate = separate(lambda g: 0.5 * g * (1 + torch.tanh(0.7978845608 * (g + 0.0447 * g**3))))
    assert_declines(gate, example_inputs(), Reason.CONSTANTS, "", backend=ONLY)


@pytest.mark.parametrize("copied", [False, True])
def test_a_write_inside_matters_where_it_is_read(copied: bool) -> None:
    def function(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        here = x * 1
        scratch = here.clone() if copied else here.view(-1)
        gate = F.silu(F.linear(here, wg, bg))
        scratch.add_(1)
        return F.linear(gate * F.linear(here, wu, bu), w2, b2) + scratch.sum()

    with torch.no_grad():
        if copied:
            assert_fused_like_eager(function, example_inputs(), counts={"gated_dense": 1}, backend=ONLY)
        else:
            assert_declines(function, example_inputs(), Reason.MUTATION, "", backend=ONLY)


@pytest.mark.parametrize("trained", [("x",), ("x", "gate_weight"), ("x", "up_weight")], ids=" ".join)
def test_a_write_into_x_after_the_block(trained: tuple[str, ...]) -> None:
    """Eager keeps x where the gradient of a weight needs it, and refuses the write itself; elsewhere we decline."""

    def function(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Any:
        here = x * 1
        y = F.linear(F.silu(F.linear(here, wg, bg)) * F.linear(here, wu, bu), w2, b2)
        here.add_(1)
        return y, here * 2

    inputs = {name: value.detach().requires_grad_(name in trained) for name, value in example_inputs().items()}
    if trained == ("x",):
        assert_declines(function, inputs, Reason.MUTATION, "", backend=ONLY)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        function(*inputs.values())[0].sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused(function, leaves(inputs), backend=ONLY)


def test_random_numbers_of_eager() -> None:
    def function(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.dropout(F.silu(F.linear(x, wg, bg)) * F.linear(x, wu, bu), 0.25), w2, b2)

    found, _ = fused(function, leaves(example_inputs()), own_random_numbers=False, backend=ONLY)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.FALLBACK_RANDOM, "linear")


def test_gates_are_no_near_misses_of_the_plain_block() -> None:
    """The gated pattern comes first; what it takes is not explained again."""
    found = assert_fused_like_eager(separate(F.silu), example_inputs(), counts={"gated_dense": 1})
    assert found.report.declines == []


def test_both_blocks_in_one_graph() -> None:
    def function(x: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        y = separate(F.silu)(x, wg, bg, wu, bu, w2, b2)
        return F.linear(F.gelu(F.linear(y, w2.t())), w2, b2)

    assert_fused_like_eager(function, example_inputs(), counts={"gated_dense": 1, "dense_act_dense": 1})


@pytest.mark.parametrize("merged", [False, True], ids=["separate", "merged"])
def test_quantized_values_are_quantized_inside(merged: bool) -> None:
    """The same numbers as with the quantisation alone, in value and in gradient."""

    def of_halves(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        gate, up = F.linear(x, w, b).chunk(2, -1)
        return F.linear(F.silu(gate) * up, w2, b2)

    function, make = (of_halves, merged_inputs) if merged else (separate(F.silu), example_inputs)
    values = make()
    found, ours = fused(
        function, leaves(values), backend=FuseBackend(["gated_dense"], quantize="fp8_e4m3", strict=True)
    )
    assert found.report.counts()["gated_dense"] == 1
    (call,) = found.calls("gated_dense")
    hidden_format, act_format = call.args[-2:]
    assert hidden_format
    assert act_format
    _, plain = fused(function, leaves(values), backend=FuseBackend([], quantize="fp8_e4m3", strict=True))
    torch.testing.assert_close(ours.values[0], plain.values[0], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(ours.grads, plain.grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
