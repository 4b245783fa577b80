"""`act(x Wgᵀ) ⊙ (x Wuᵀ) → [dropout] → W2`: values, gradients, and what is kept for backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.numerics import random_bits
from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.patterns.spellings.gated_dense import CORPUS
from tests.ops.gradients import DTYPES, ROWS, assert_gradients_exact, run, wide
from tests.precision import assert_as_exact_as_eager

example_inputs, reference = CORPUS.example_inputs, CORPUS.reference

ops = torch.ops.fuse_pass
SEED, P = 0x1234_5678_9ABC_DEF0, 0.3
ARGUMENTS: dict[str, tuple[float, ...]] = {
    "leaky_relu": (0.2,), "elu": (0.7,), "hardtanh": (-0.5, 0.7), "softplus": (2.0, 3.0),
}  # fmt: skip
NAMES = ("x", "gate_weight", "gate_bias", "up_weight", "up_bias", "weight2", "bias2")
GATES = [name for name in ACTIVATIONS if name not in ("prelu", "star_relu")]
MODES = ("separate", "merged", "merged, gate second")


def settings(activation: str = "silu", p: float = P, mode: str = "separate") -> tuple[Any, ...]:
    seed = torch.tensor(SEED) if p else None
    return seed, p, activation, list(ARGUMENTS.get(activation, ())), mode == MODES[2]


def arguments(values: dict[str, Any], mode: str) -> list[Any]:
    """The tensor arguments of the op; a merged projection is made of the two."""
    x, wg, bg, wu, bu, w2, b2 = (values[name] for name in NAMES)
    if mode == "separate":
        return [x, wg, bg, wu, bu, w2, b2]
    order = slice(None, None, -1 if mode == MODES[2] else 1)
    bias = None if bg is None else torch.cat([bg, bu][order])
    return [x, torch.cat([wg, wu][order]), bias, None, None, w2, b2]


def ours(values: dict[str, Any], activation: str = "silu", p: float = P, mode: str = "separate") -> Tensor:
    y: Tensor = ops.gated_dense(*arguments(values, mode), *settings(activation, p, mode))[0]
    return y


def by_reference(values: dict[str, Any], activation: str = "silu", p: float = P, mode: str = "separate") -> Tensor:
    x, hidden = values["x"], values["gate_weight"].shape[0]
    keep = None
    if p:
        keep = random_bits.keep_mask(torch.tensor(SEED), x.shape[:-1].numel(), hidden, p).view(*x.shape[:-1], hidden)
    return reference(
        *(values[name] for name in NAMES), activation=activation, arguments=ARGUMENTS.get(activation, ()),
        keep=keep, p=p,
    )  # fmt: skip


def assert_exact(values: dict[str, Any], *options: Any) -> None:
    assert_gradients_exact(ours, by_reference, values, *options)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, P, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_as_exact_as_eager(mode: str, dtype: torch.dtype, p: float) -> None:
    assert_exact(example_inputs(dtype), "silu", p, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", GATES)
def test_every_activation_can_be_the_gate(activation: str, mode: str) -> None:
    assert_exact(example_inputs(), activation, P, mode)
    values = example_inputs(torch.float64)
    exact = run(by_reference, values, activation)
    for name, value in run(ours, values, activation, P, mode).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", ROWS)
def test_ranks_and_biases(rank: str, mode: str, bias: bool) -> None:
    assert_exact(example_inputs(bias=bias, rows=ROWS[rank]), "silu", P, mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_sizes_of_a_real_layer(mode: str, dtype: torch.dtype) -> None:
    """Large enough that the probe's table decides who multiplies."""
    sizes = [(64, 128), (256, 128), (256,), (256, 128), (256,), (128, 256), (128,)]
    values = {
        name: (torch.randn(shape, dtype=torch.float64) / (1 if name == "x" else shape[-1] ** 0.5)).to(dtype)
        for name, shape in zip(NAMES, sizes, strict=True)
    }
    assert_exact({name: value.requires_grad_() for name, value in values.items()}, "silu", P, mode)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "sigmoid"])
def test_gradients_and_second_gradients(activation: str, mode: str, p: float) -> None:
    values = example_inputs(torch.float64, rows=(2, 3))

    def function(*leaves: Tensor) -> Tensor:
        return ours(dict(zip(NAMES, leaves, strict=True)), activation, p, mode)

    tensors = [values[name] for name in NAMES]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_inference_gives_the_value_of_training(mode: str) -> None:
    values = example_inputs()
    with torch.no_grad():
        y = ops.gated_dense_inference(*arguments(values, mode), *settings(mode=mode))
    assert_as_exact_as_eager(y, by_reference(values), by_reference(wide(values)))


@pytest.mark.parametrize("mode", MODES)
def test_operands_of_any_strides(mode: str) -> None:
    values = example_inputs()
    views = {name: torch.stack([v.detach()] * 2, -1)[..., 0].requires_grad_() for name, v in values.items()}
    assert not views["x"].is_contiguous()
    assert_exact(views, "silu", P, mode)
    # `y.sum()` sends an expanded gradient.
    result, exact = (
        torch.autograd.grad(f(values, "silu", P, mode).sum(), list(values.values())) for f in (ours, by_reference)
    )
    for mine, theirs in zip(result, exact, strict=True):
        torch.testing.assert_close(mine, theirs)


# --- which gradients, and what is saved -------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [f"{i:07b}" for i in range(1, 127)])
def test_frozen_tensors_get_no_gradient_and_change_no_other(frozen: str) -> None:
    values = example_inputs()
    full = run(ours, values)
    for name, bit in zip(NAMES, frozen, strict=True):
        values[name].requires_grad_(bit == "0")
    for name, grad in run(ours, values).items():
        torch.testing.assert_close(grad, full[name], msg=name)
    ours(values).sum().backward()
    assert {name for name in NAMES if values[name].grad is None} == {
        name for name, bit in zip(NAMES, frozen, strict=True) if bit == "1"
    }


@pytest.mark.parametrize("mode", MODES)
def test_pre_activations_have_no_gradient(mode: str) -> None:
    _, *kept = ops.gated_dense(*arguments(example_inputs(), mode), *settings(mode=mode))
    assert not any(tensor.requires_grad for tensor in kept)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("mode", MODES)
def test_saved_are_inputs_and_pre_activations(mode: str, p: float) -> None:
    """Eager also keeps the activation, the product and the mask."""
    values = example_inputs()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()) or t, lambda t: t):
        ours(values, "silu", p, mode)
    hidden = sum(t.numel() for t in saved if t.dim() == 2 and t.shape[0] == 15)
    assert hidden == 2 * 15 * 24
    assert not [t for t in saved if not t.is_floating_point() and t.dim() > 0]


# --- autocast, fake tensors, opcheck ----------------------------------------------------------------------------------


def by_linears(values: dict[str, Any]) -> Tensor:
    x, wg, bg, wu, bu, w2, b2 = values.values()
    return F.linear(F.silu(F.linear(x, wg, bg)) * F.linear(x, wu, bu), w2, b2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_gives_the_dtypes_of_eager(dtype: torch.dtype, mode: str) -> None:
    values = example_inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        eager, result = by_linears(values), ours(values, "silu", 0.0, mode)
        inference = ops.gated_dense_inference(*arguments(values, mode), *settings(p=0.0, mode=mode))
    assert result.dtype is inference.dtype is eager.dtype
    exact = by_linears(wide(values))
    assert_as_exact_as_eager(result, eager, exact)
    assert_as_exact_as_eager(inference, eager, exact)
    for name, grad in zip(NAMES, torch.autograd.grad(result.sum(), list(values.values())), strict=True):
        assert grad.dtype is dtype, name


@pytest.mark.parametrize("mode", MODES)
def test_fake_tensors_with_symbolic_sizes(mode: str) -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    values = {name: value.detach() for name, value in example_inputs().items()}
    with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()) as fake_mode:
        fake = {name: fake_mode.from_tensor(v, static_shapes=name != "x") for name, v in values.items()}
        given = arguments(fake, mode)
        y, h, up = ops.gated_dense(*given, *settings(p=0.0, mode=mode))
        x, w1, _, wu, _, w2, _ = given
        kept = None if wu is None else up
        mask = [value is not None for value in given]
        grads = ops.gated_dense_backward(y, x, w1, wu, w2, h, kept, *settings(p=0.0, mode=mode), mask)
        assert [*y.shape] == [x.shape[0], x.shape[1], 16]
        assert h.shape[0] == x.shape[0] * x.shape[1]
        assert [grad.shape for grad in grads if grad.numel()] == [t.shape for t in given if t is not None]
        assert not [guard for guard in fake_mode.shape_env.guards if "==" in str(guard.expr)]


def backward_case(mode: str, mask: list[bool]) -> tuple[Any, tuple[Any, ...]]:
    values = {name: value.detach() for name, value in example_inputs().items()}
    x, w1, _, wu, _, w2, _ = arguments(values, mode)
    h, up = (torch.randn(15, 48), None) if wu is None else (torch.randn(15, 24), torch.randn(15, 24))
    return ops.gated_dense_backward, (torch.randn(3, 5, 16), x, w1, wu, w2, h, up, *settings(mode=mode), mask)


MERGED_MASK = [True, True, True, False, False, True, True]
OPCHECKS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    **{
        f"forward, {mode}": functools.partial(
            lambda mode: (
                ops.gated_dense,
                (
                    *(None if a is None else a.detach().requires_grad_() for a in arguments(example_inputs(), mode)),
                    *settings(mode=mode),
                ),
            ),
            mode,
        )
        for mode in MODES
    },
    "inference": lambda: (
        ops.gated_dense_inference,
        (*(v.detach() for v in example_inputs(rows=(5,)).values()), *settings("gelu", 0.0)),
    ),
    "backward": lambda: backward_case("separate", [True] * 7),
    "backward of some": lambda: backward_case("separate", [False, True, False, False, True, False, True]),
    "backward, merged": lambda: backward_case("merged", MERGED_MASK),
    "backward, gate second": lambda: backward_case(MODES[2], MERGED_MASK),
}


@pytest.mark.filterwarnings("error:.*may not alias.*")
@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case: str) -> None:
    op, given = OPCHECKS[case]()
    torch.library.opcheck(op.default, given)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_like_eager(mode: str) -> None:
    """The decomposition through Inductor: value, gradients and the mask of both."""
    values = example_inputs(rows=(7,))
    compiled = torch.compile(lambda *leaves: ours(dict(zip(NAMES, leaves, strict=True)), "silu", P, mode))
    result = run(lambda given: compiled(*given.values()), values)
    eager, exact = run(by_reference, values), run(by_reference, wide(values))
    for name, value in result.items():
        assert_as_exact_as_eager(value, eager[name], exact[name], name)
