"""FusedDenseGELUDense against its three `torch.nn` parts, in every way that a layer is used."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fuse_pass import FusedDenseGELUDense
from tests.capture import capture
from tests.precision import assert_as_exact_as_eager

DIM, HIDDEN = 12, 40


def parts_of(layer: FusedDenseGELUDense) -> nn.Sequential:
    return nn.Sequential(layer.dense1, layer.act, layer.dense2)


def run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x.grad": x.grad, **grads}


EXAMPLES_OF_THE_SEED = {
    "basic usage": """
model = FusedDenseGELUDense(dim=512, dim_out=1024)

# Generate random input tensor
x = torch.randn(1, 512)

# Forward pass
out = model(x)
""",
    "custom configuration": """
custom_model = FusedDenseGELUDense(
    dim=256, dim_out=512, bias=False, has_fp16_weights=True, threshold=4.0
)

# Generate random input tensor
x = torch.randn(1, 256)

# Forward pass with the custom configuration
out = custom_model(x)
""",
    "quantization with bitsandbytes": """
quantizedim = FusedDenseGELUDense(
    dim=512, dim_out=1024, has_fp16_weights=True, threshold=4.0
)

# Generate random input tensor
x = torch.randn(1, 512)

# Forward pass with quantization
out = quantizedim(x)
""",
}


@pytest.mark.parametrize("example", EXAMPLES_OF_THE_SEED)
def test_examples_of_the_seed(example: str) -> None:
    scope: dict[str, Any] = {}
    exec("import torch\n\nfrom fuse_pass.nn import FusedDenseGELUDense\n" + EXAMPLES_OF_THE_SEED[example], scope)
    assert scope["out"].shape == scope["x"].shape
    assert scope["out"].dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_values_and_gradients(dtype: torch.dtype, bias: bool, approximate: str) -> None:
    layer = FusedDenseGELUDense(DIM, HIDDEN, bias, approximate=approximate).to(dtype)
    x = torch.randn(3, 5, DIM).to(dtype)
    exact = run(parts_of(copy.deepcopy(layer).double()), x.double())
    eager, ours = run(parts_of(copy.deepcopy(layer)), x), run(layer, x)
    names = {"0.weight": "dense1.weight", "0.bias": "dense1.bias", "2.weight": "dense2.weight", "2.bias": "dense2.bias"}
    assert len(exact) == len(ours) == (6 if bias else 4)
    for name in exact:
        assert_as_exact_as_eager(ours[names.get(name, name)], eager[name], exact[name], name)


@pytest.mark.parametrize("shape", [(DIM,), (7, DIM), (2, 3, DIM), (2, 3, 4, DIM), (0, DIM), (2, 0, DIM)])
def test_any_rank_and_empty_batches(shape: tuple[int, ...]) -> None:
    layer = FusedDenseGELUDense(DIM, HIDDEN)
    ours, eager = run(layer, torch.randn(shape)), run(parts_of(layer), torch.zeros(shape))
    assert ours["y"].shape == shape
    assert ours["x.grad"].shape == shape
    assert ours["dense1.weight"].shape == eager["0.weight"].shape
    with torch.no_grad():
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), parts_of(layer)(x))


def test_saves_the_input_and_the_pre_activation_only() -> None:
    layer, x = FusedDenseGELUDense(DIM, HIDDEN), torch.randn(5, DIM, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    activations = [t for t in saved if t.data_ptr() not in parameters]
    assert sorted(tuple(t.shape) for t in activations) == [(5, DIM), (5, HIDDEN)]
    torch.testing.assert_close(next(t for t in activations if t.shape[-1] == HIDDEN), layer.dense1(x))


@pytest.mark.parametrize("frozen", ["dense1", "dense2"])
def test_frozen_parts_get_no_gradient(frozen: str) -> None:
    layer = FusedDenseGELUDense(DIM, HIDDEN)
    getattr(layer, frozen).requires_grad_(False)
    x = torch.randn(4, DIM)
    expected = run(parts_of(copy.deepcopy(layer)), x)
    ours = run(layer, x)
    assert not any(name.startswith(frozen) for name in ours)
    torch.testing.assert_close(list(ours.values()), list(expected.values()))


def test_second_derivatives() -> None:
    layer = FusedDenseGELUDense(3, 5).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_state_dict_is_that_of_the_linear_layers() -> None:
    first, second = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
    layer = FusedDenseGELUDense(DIM, HIDDEN)
    state = {
        f"dense{i}.{name}": value for i, part in ((1, first), (2, second)) for name, value in part.state_dict().items()
    }
    assert layer.load_state_dict(state).missing_keys == []
    x = torch.randn(4, DIM)
    torch.testing.assert_close(layer(x), second(nn.functional.gelu(first(x))))
    assert list(layer.state_dict()) == ["dense1.weight", "dense1.bias", "dense2.weight", "dense2.bias"]


def test_attributes_are_those_of_the_seed() -> None:
    layer = FusedDenseGELUDense(DIM, HIDDEN, bias=False, threshold=2.5)
    assert (layer.dim, layer.dim_out, layer.bias, layer.has_fp16_weights, layer.threshold) == (
        DIM, HIDDEN, False, False, 2.5,
    )  # fmt: skip
    assert layer.dense1.bias is None
    assert layer.dense2.bias is None
    assert isinstance(layer.act, nn.GELU)


@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 7), torch.randn(3, DIM).double(), torch.ones(3, DIM, dtype=torch.long), torch.tensor(1.0)],
    ids=["size", "dtype", "integers", "0-d"],
)
def test_wrong_input_raises_what_torch_raises(x: Tensor) -> None:
    layer = FusedDenseGELUDense(DIM, HIDDEN)
    with pytest.raises(RuntimeError) as expected:
        parts_of(layer)(x)
    with pytest.raises(RuntimeError) as ours:
        layer(x)
    assert str(ours.value) == str(expected.value)


def test_another_device_raises() -> None:
    with pytest.raises(RuntimeError, match="device"):
        FusedDenseGELUDense(DIM, HIDDEN)(torch.randn(3, DIM, device="meta"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"approximate": "erf"}, ValueError, "expected 'none' or 'tanh', got 'erf'"),
        ({"threshold": -1.0}, ValueError, "threshold"),
        ({"threshold": float("nan")}, ValueError, "threshold"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedDenseGELUDense(DIM, HIDDEN, **arguments)


def test_hooks_on_the_parts_run() -> None:
    layer, seen = FusedDenseGELUDense(DIM, HIDDEN), []
    layer.act.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    x = torch.randn(3, DIM)
    torch.testing.assert_close(layer(x), parts_of(layer)(x))
    assert seen[0] == (3, HIDDEN)


@pytest.mark.parametrize("change", ["spectral norm", "pruning", "another activation", "another forward"])
def test_changed_parts_are_respected(change: str) -> None:
    layer = FusedDenseGELUDense(DIM, HIDDEN)
    if change == "spectral norm":
        parametrizations.spectral_norm(layer.dense1)
        layer.eval()
    elif change == "pruning":
        prune.random_unstructured(layer.dense2, "weight", amount=0.5)
    elif change == "another activation":
        layer.act = nn.SiLU()
    else:
        layer.dense1.forward = lambda x: torch.ones(*x.shape[:-1], HIDDEN)
    x = torch.randn(3, DIM)
    torch.testing.assert_close(layer(x), layer.dense2(layer.act(layer.dense1(x))))


def test_eager_compiled_and_rewritten_agree() -> None:
    layer, x = FusedDenseGELUDense(DIM, HIDDEN), torch.randn(6, DIM)
    eager = run(layer, x)
    names = {"dense1.weight": "0.weight", "dense1.bias": "0.bias", "dense2.weight": "2.weight", "dense2.bias": "2.bias"}
    for compiled in (
        torch.compile(layer, fullgraph=True),
        torch.compile(layer, backend="fuse_pass", fullgraph=True, dynamic=True),
        torch.compile(parts_of(layer), backend="fuse_pass", fullgraph=True),
    ):
        result = run(compiled, x)
        for name, value in eager.items():
            key = next(k for k in result if k.endswith(name) or k.endswith(names.get(name, name)))
            torch.testing.assert_close(result[key], value, msg=name)


def test_our_own_layer_holds_nothing_more_to_fuse() -> None:
    captured = capture(FusedDenseGELUDense(DIM, HIDDEN), torch.randn(3, DIM))
    assert not captured.report.matches
    assert len(captured.calls("dense_act_dense")) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer, x = FusedDenseGELUDense(DIM, HIDDEN), torch.randn(3, DIM)
    with torch.autocast("cpu", dtype):
        ours, theirs = layer(x), parts_of(layer)(x)
    assert ours.dtype is theirs.dtype is dtype
    exact = parts_of(copy.deepcopy(layer).double())(x.double())
    assert_as_exact_as_eager(ours, theirs, exact)
    ours.float().sum().backward()
    assert layer.dense1.weight.grad.dtype is torch.float32


def test_modes_and_transforms() -> None:
    layer, x = FusedDenseGELUDense(DIM, HIDDEN), torch.randn(4, 3, DIM)
    expected = parts_of(layer)(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
    torch.testing.assert_close(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False), expected)
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: parts_of(layer)(x).sum())(x))


def test_copies_pickles_and_exports() -> None:
    layer, x = FusedDenseGELUDense(DIM, HIDDEN), torch.randn(3, DIM)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), expected)
    program = torch.export.export(layer, (x,))
    assert any("fuse_pass" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), expected)
    assert "dim=12, dim_out=40" in repr(layer)
