"""Linear → activation → [dropout] → Linear: values, gradients, and what is kept for backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.numerics import random_bits
from fuse_pass.numerics.activations import ACTIVATIONS
from fuse_pass.patterns.spellings.dense_act_dense import CORPUS
from tests.ops.gradients import DTYPES, ROWS, assert_gradients_exact, run, wide
from tests.precision import assert_as_exact_as_eager

example_inputs, reference = CORPUS.example_inputs, CORPUS.reference

ops = torch.ops.fuse_pass
SEED, P = 0x1234_5678_9ABC_DEF0, 0.3
ARGUMENTS: dict[str, tuple[float, ...]] = {
    "leaky_relu": (0.2,), "elu": (0.7,), "hardtanh": (-0.5, 0.7), "softplus": (2.0, 3.0),
}  # fmt: skip
LEARNED = {"prelu": (0.3,), "star_relu": (0.9, -0.4)}
NAMES = ("x", "weight1", "bias1", "weight2", "bias2", "act_weight")


def inputs(activation: str = "gelu", dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    learned = LEARNED.get(activation)
    act_weight = None if learned is None else torch.tensor(learned, dtype=dtype).requires_grad_()
    return example_inputs(dtype, **options) | {"act_weight": act_weight}


def settings(activation: str = "gelu", p: float = P) -> tuple[Any, ...]:
    return (torch.tensor(SEED) if p else None, p, activation, list(ARGUMENTS.get(activation, ())))


def ours(values: dict[str, Any], activation: str = "gelu", p: float = P) -> Tensor:
    y: Tensor = ops.dense_act_dense(*(values[name] for name in NAMES), *settings(activation, p))[0]
    return y


def by_reference(values: dict[str, Any], activation: str = "gelu", p: float = P) -> Tensor:
    x, hidden = values["x"], values["weight1"].shape[0]
    keep = None
    if p:
        keep = random_bits.keep_mask(torch.tensor(SEED), x.shape[:-1].numel(), hidden, p).view(*x.shape[:-1], hidden)
    return reference(
        *(values[name] for name in NAMES[:5]), activation=activation, arguments=ARGUMENTS.get(activation, ()),
        act_weight=values["act_weight"], keep=keep, p=p,
    )  # fmt: skip


def assert_exact(values: dict[str, Any], *arguments: Any) -> None:
    assert_gradients_exact(ours, by_reference, values, *arguments)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, P, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_exact_as_eager(activation: str, dtype: torch.dtype, p: float) -> None:
    assert_exact(inputs(activation, dtype), activation, p)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", ROWS)
def test_ranks_and_biases(rank: str, dtype: torch.dtype, bias: bool) -> None:
    assert_exact(inputs(dtype=dtype, bias=bias, rows=ROWS[rank]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_a_real_layer(dtype: torch.dtype) -> None:
    """Large enough that the probe's table decides who multiplies."""
    sizes = {"x": (64, 128), "weight1": (256, 128), "bias1": (256,), "weight2": (128, 256), "bias2": (128,)}
    values: dict[str, Any] = {
        name: (torch.randn(shape, dtype=torch.float64) / (1 if name == "x" else shape[-1] ** 0.5)).to(dtype)
        for name, shape in sizes.items()
    }
    assert_exact({name: value.requires_grad_() for name, value in values.items()} | {"act_weight": None})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_equals_the_reference(activation: str) -> None:
    values = inputs(activation, torch.float64)
    for name, value in run(ours, values, activation).items():
        torch.testing.assert_close(value, run(by_reference, values, activation)[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("activation", ["gelu", "silu", "mish", "prelu", "star_relu", "quick_gelu"])
def test_gradients_and_second_gradients(activation: str, p: float) -> None:
    values = inputs(activation, torch.float64, rows=(2, 3))
    tensors = [values[name] for name in NAMES]

    def function(*leaves: Tensor) -> Tensor:
        return ours(dict(zip(NAMES, leaves, strict=True)), activation, p)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_gradients_of_the_tail() -> None:
    values = inputs("prelu", torch.float64)
    h = torch.randn(2, 3, 24, dtype=torch.float64).requires_grad_()
    tail = (h, values["weight2"], values["bias2"], values["act_weight"])

    def function(*tensors: Tensor) -> Tensor:
        y: Tensor = ops.act_dense(*tensors, *settings("prelu"))
        return y

    assert torch.autograd.gradcheck(function, tail, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tail, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "prelu"])
def test_tail_is_the_second_half(activation: str, dtype: torch.dtype) -> None:
    values = inputs(activation, dtype)

    def in_two(values: dict[str, Any]) -> Tensor:
        h = F.linear(values["x"], values["weight1"], values["bias1"])
        y: Tensor = ops.act_dense(h, values["weight2"], values["bias2"], values["act_weight"], *settings(activation))
        return y

    result, eager = run(in_two, values), run(by_reference, values, activation)
    for name, exact in run(by_reference, wide(values), activation).items():
        assert_as_exact_as_eager(result[name], eager[name], exact, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, P])
def test_inference_gives_the_value_of_training(activation: str, p: float) -> None:
    values = inputs(activation)
    with torch.no_grad():
        y = ops.dense_act_dense_inference(*(values[name] for name in NAMES), *settings(activation, p))
    exact = by_reference(wide(values), activation, p)
    assert_as_exact_as_eager(y, by_reference(values, activation, p), exact)


def test_slope_per_channel() -> None:
    values = inputs("prelu", rows=(5,)) | {"act_weight": torch.linspace(-0.5, 0.5, 24).requires_grad_()}
    assert_exact(values, "prelu")


def test_operands_of_any_strides() -> None:
    values = inputs()
    strided = {
        name: value if value is None else torch.stack([value.detach()] * 2, -1) for name, value in values.items()
    }
    views = {name: None if v is None else v[..., 0].requires_grad_() for name, v in strided.items()}
    assert not views["x"].is_contiguous()
    assert_exact(views)
    # `y.sum()` sends an expanded gradient.
    leaves = [values[name] for name in NAMES[:5]]
    result, exact = (torch.autograd.grad(f(values).sum(), leaves) for f in (ours, by_reference))
    for ours_, theirs in zip(result, exact, strict=True):
        torch.testing.assert_close(ours_, theirs)


# --- which gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [f"{i:06b}" for i in range(1, 63)])
def test_frozen_tensors_get_no_gradient_and_change_no_other(frozen: str) -> None:
    values = inputs("prelu")
    full = run(ours, values, "prelu")
    for name, bit in zip(NAMES, frozen, strict=True):
        values[name].requires_grad_(bit == "0")
    for name, grad in run(ours, values, "prelu").items():
        assert torch.equal(grad, full[name]), name
    ours(values, "prelu").sum().backward()
    assert {name for name in NAMES if values[name].grad is None} == {
        name for name, bit in zip(NAMES, frozen, strict=True) if bit == "1"
    }


def test_h_has_no_gradient() -> None:
    _, h = ops.dense_act_dense(*(inputs()[name] for name in NAMES), *settings())
    assert not h.requires_grad


def test_backward_computes_only_what_is_asked_for() -> None:
    values = {name: None if value is None else value.detach() for name, value in inputs().items()}
    h = F.linear(values["x"].flatten(0, 1), values["weight1"])
    arguments = (values["x"], values["weight1"], values["weight2"], h, None, *settings())
    grads = ops.dense_act_dense_backward(torch.randn(3, 5, 16), *arguments, [False, False, False, True, False, False])
    assert [grad.numel() for grad in grads] == [0, 0, 0, 16 * 24, 0, 0]


# --- what is saved ----------------------------------------------------------------------------------------------------


def saved_by(function: Callable[[], Tensor]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()) or t, lambda t: t):
        function()
    return saved


@pytest.mark.parametrize("p", [0.0, P])
def test_saved_are_inputs_and_h(p: float) -> None:
    values = inputs()
    saved = saved_by(lambda: ours(values, "gelu", p))
    h = F.linear(values["x"], values["weight1"], values["bias1"]).flatten(0, 1).detach()
    of_hidden_size = [t for t in saved if t.numel() == h.numel()]
    assert len(of_hidden_size) == 1, "act(h) or a mask is kept"
    torch.testing.assert_close(of_hidden_size[0], h)
    known = [value.detach() for value in values.values() if value is not None] + ([torch.tensor(SEED)] if p else [])
    for tensor in saved:
        if tensor is not of_hidden_size[0]:
            assert any(tensor.shape == k.shape and tensor.dtype == k.dtype and torch.equal(tensor, k) for k in known)
    assert not [t for t in saved if not t.is_floating_point() and t.dim() > 0]


def test_tail_saves_nothing_new() -> None:
    values, h = inputs(), torch.randn(3, 5, 24, requires_grad=True)
    saved = saved_by(lambda: ops.act_dense(h, values["weight2"], values["bias2"], None, *settings()))
    assert [t.shape for t in saved if t.numel() == h.numel()] == [h.shape]
    assert len(saved) == 4  # h, weight2, bias2, seed


# --- autocast, export, fake tensors, opcheck --------------------------------------------------------------------------


def by_linears(values: dict[str, Any]) -> Tensor:
    a = F.gelu(F.linear(values["x"], values["weight1"], values["bias1"]))
    return F.linear(a, values["weight2"], values["bias2"])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_gives_the_dtypes_of_eager(dtype: torch.dtype, half: torch.dtype) -> None:
    values = inputs(dtype=dtype)
    with torch.autocast("cpu", half):
        eager, result = by_linears(values), ours(values, "gelu", 0.0)
        inference = ops.dense_act_dense_inference(*(values[name] for name in NAMES), *settings(p=0.0))
    assert result.dtype is inference.dtype is eager.dtype
    exact = by_linears(wide(values))
    assert_as_exact_as_eager(result, eager, exact)
    assert_as_exact_as_eager(inference, eager, exact)
    leaves = [values[name] for name in NAMES[:5]]
    for name, mine, theirs in zip(
        NAMES, torch.autograd.grad(result.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=False
    ):
        assert mine.dtype is theirs.dtype is dtype, name


def test_autocast_of_the_tail() -> None:
    values, h = inputs(), torch.randn(3, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        eager = F.linear(F.gelu(h.bfloat16()), values["weight2"], values["bias2"])
        result = ops.act_dense(h, values["weight2"], values["bias2"], None, *settings(p=0.0))
    assert_as_exact_as_eager(result, eager, F.linear(F.gelu(h.double()), *(values[n].double() for n in NAMES[3:5])))


def test_nothing_is_cast_where_autocast_is_off() -> None:
    values = inputs()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert ours(values).dtype is torch.float32


class Calling(nn.Module):
    """A module that calls the op by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        parameters = (self.first.weight, self.first.bias, self.second.weight, self.second.bias)
        y: Tensor = ops.dense_act_dense(x, *parameters, None, None, 0.0, "gelu", [])[0]
        return y


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic: bool) -> None:
    module, x = Calling(), torch.randn(3, 5, 8)
    shapes = {"x": {0: torch.export.Dim("batch")}} if dynamic else None
    program = torch.export.export(module, (x,), dynamic_shapes=shapes)
    assert "fuse_pass.dense_act_dense.default" in program.graph_module.code
    for rows in (3, 7) if dynamic else (3,):
        x = torch.randn(rows, 5, 8)
        torch.testing.assert_close(program.module()(x), module.second(F.gelu(module.first(x))))


def test_fake_tensors_with_symbolic_sizes() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    values = inputs()
    with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = {
            name: None if value is None else mode.from_tensor(value, static_shapes=name != "x")
            for name, value in values.items()
        }
        x = fake["x"]
        y, h = ops.dense_act_dense(*(fake[name] for name in NAMES), *settings(p=0.0))
        grads = ops.dense_act_dense_backward(
            y, x, fake["weight1"], fake["weight2"], h, None, *settings(p=0.0), [True] * 5 + [False]
        )
        assert isinstance(y.shape[0], torch.SymInt)
        assert [*y.shape] == [x.shape[0], x.shape[1], 16]
        assert h.shape[1] == 24
        assert h.shape[0] == x.shape[0] * x.shape[1]
        assert [grad.shape for grad in grads[:5]] == [fake[name].shape for name in NAMES[:5]]
        assert not [guard for guard in mode.shape_env.guards if "==" in str(guard.expr)]


OPCHECKS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "forward": lambda: (ops.dense_act_dense, (*(inputs()[name] for name in NAMES), *settings())),
    "forward prelu, rank 2, no bias": lambda: (
        ops.dense_act_dense,
        (*(inputs("prelu", bias=False, rows=(5,))[name] for name in NAMES), *settings("prelu", 0.0)),
    ),
    "inference": lambda: (
        ops.dense_act_dense_inference,
        (*(None if inputs()[name] is None else inputs()[name].detach() for name in NAMES), *settings()),
    ),
    "tail": lambda: (
        ops.act_dense,
        (torch.randn(3, 5, 24, requires_grad=True), inputs()["weight2"], None, None, *settings()),
    ),
    **{
        f"backward {''.join(str(int(bit)) for bit in output_mask)}": functools.partial(
            lambda output_mask: (
                ops.dense_act_dense_backward,
                (
                    *(torch.randn(*s) for s in ((3, 5, 16), (3, 5, 8), (24, 8), (16, 24), (15, 24))),
                    *(None, *settings(), output_mask),
                ),
            ),
            output_mask,
        )
        for output_mask in ([True] * 5 + [False], [False, True, False, False, True, False])
    },
    "backward of the tail": lambda: (
        ops.act_dense_backward,
        (*(torch.randn(*s) for s in ((5, 16), (5, 24), (16, 24))), None, *settings(), [True, False, False, False]),
    ),
}


@pytest.mark.filterwarnings("error:.*may not alias.*")
@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case: str) -> None:
    op, arguments = OPCHECKS[case]()
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_dropout_in_forward_and_backward_is_the_same_when_compiled(dynamic: bool) -> None:
    """With weights 1 the value itself shows the mask, and so does the gradient; also for a rate that changes."""
    eye, seed = torch.eye(64), torch.tensor(SEED)

    def step(h: Tensor, p: float) -> Tensor:
        y: Tensor = ops.act_dense(h, eye, None, None, seed, p, "relu", [])
        return y

    compiled = torch.compile(step, backend="inductor", dynamic=dynamic)
    for p in (0.3, 0.6):
        h = torch.ones(32, 64, requires_grad=True)
        y = compiled(h, p)
        y.sum().backward()
        assert torch.equal(y != 0, random_bits.keep_mask(seed, 32, 64, p))
        assert h.grad is not None
        torch.testing.assert_close(h.grad, y.detach())
