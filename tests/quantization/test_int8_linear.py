"""FusedDenseGELUDense and Int8Linear with LLM.int8 products: float16 weights that train, int8 weights for inference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fuse_pass.nn import FusedDenseGELUDense
from fuse_pass.ops.llm_int8 import llm_int8_linear, quantize_rows
from fuse_pass.quantization.layers.int8_linear import Int8Linear

DIM, HIDDEN, ROWS = 16, 40, 6
LINEARS = ("dense1", "dense2")


def layer_of(threshold: float = 2.0, **options: Any) -> FusedDenseGELUDense:
    return FusedDenseGELUDense(DIM, HIDDEN, has_fp16_weights=True, threshold=threshold, **options)


def by_parts(layer: FusedDenseGELUDense, x: Tensor) -> Tensor:
    """Float weights, or int8 weights with their scales, through the op alone."""
    h = x
    for i, part in enumerate((layer.dense1, layer.dense2)):
        h = F.gelu(h, approximate=layer.act.approximate) if i else h
        h = llm_int8_linear(h, part.weight, part.bias, scale=part.weight_scale, threshold=layer.threshold)
    return h


def float_twin(layer: FusedDenseGELUDense) -> FusedDenseGELUDense:
    twin = FusedDenseGELUDense(DIM, HIDDEN, layer.bias, approximate=layer.act.approximate)
    twin.load_state_dict(layer.state_dict())
    return twin


# --- float16 weights --------------------------------------------------------------------------------------------------


def test_weights_are_trainable_float16_parameters() -> None:
    layer = layer_of()
    assert {name: p.dtype for name, p in layer.named_parameters() if p.requires_grad} == {
        "dense1.weight": torch.float16, "dense1.bias": torch.float32,
        "dense2.weight": torch.float16, "dense2.bias": torch.float32,
    }  # fmt: skip
    assert list(layer.state_dict()) == ["dense1.weight", "dense1.bias", "dense2.weight", "dense2.bias"]
    assert layer.has_fp16_weights
    assert "threshold=2.0, weight=float16" in repr(layer)


def test_same_seed_same_weights_as_the_float_layer() -> None:
    torch.manual_seed(3)
    float_layer = FusedDenseGELUDense(DIM, HIDDEN)
    torch.manual_seed(3)
    layer = layer_of()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, float_layer.state_dict()[name].to(value.dtype))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0, 1e6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(DIM,), (ROWS, DIM), (2, 3, DIM), (0, DIM)])
def test_is_two_llm_int8_products(threshold: float, bias: bool, approximate: str, shape: tuple[int, ...]) -> None:
    layer = layer_of(threshold, bias=bias, approximate=approximate)
    x = torch.randn(shape, requires_grad=True)
    ours, expected = layer(x), by_parts(layer, x)
    assert torch.equal(ours, expected)
    leaves = [x, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(ours.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_close_to_the_float_layer_in_value_and_gradient(dtype: torch.dtype, quantized: bool) -> None:
    layer = layer_of(6.0)
    exact = float_twin(layer).double()
    layer = layer.quantize_() if quantized else layer
    x = torch.randn(64, DIM).to(dtype).requires_grad_()
    y, expected = layer(x), exact(x.double())
    assert y.dtype is dtype
    assert (y.double() - expected).norm() < 0.02 * expected.norm()
    grad, expected_grad = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    assert (grad.double() - expected_grad).norm() < 0.04 * expected_grad.norm()


def test_saves_the_input_and_the_pre_activation_only() -> None:
    layer, x = layer_of(), torch.randn(ROWS, DIM, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    activations = [t for t in saved if t.data_ptr() not in parameters]
    assert [tuple(t.shape) for t in activations] == [(ROWS, DIM), (ROWS, HIDDEN)]


def test_training_lowers_the_loss_and_evaluation_follows_every_step() -> None:
    layer, x = layer_of(), torch.randn(64, DIM)
    target = torch.tanh(x.roll(1, 1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        before = layer.eval()(x)
        optimizer.step()
        after = layer(x)
        assert not torch.equal(after, before)
        fresh = layer_of()
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x), after)
        assert torch.equal(layer.train()(x), after)
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_activations_that_float16_cannot_hold() -> None:
    for layer in (layer_of(6.0), layer_of(6.0).quantize_(), layer_of(0.0)):
        x = torch.randn(ROWS, DIM) * 1e6
        y, exact = layer(x), by_parts(layer, x)
        assert torch.isfinite(y).all()
        assert y.abs().max() > 65504
        assert torch.equal(y, exact)


def test_zeros_give_finite_values() -> None:
    for layer in (layer_of(), layer_of().quantize_()):
        assert torch.isfinite(layer(torch.zeros(ROWS, DIM))).all()


def test_threshold_can_be_changed() -> None:
    layer, x = layer_of(0.0), torch.randn(ROWS, DIM) * 3
    expected = layer_of(1.0)
    expected.load_state_dict(layer.state_dict())
    without = layer(x)
    layer.threshold = 1.0
    assert layer.dense1.threshold == layer.dense2.threshold == layer.threshold == 1.0
    assert torch.equal(layer(x), expected(x))
    assert not torch.equal(layer(x), without)


@pytest.mark.parametrize(
    ("threshold", "error"),
    [(-1.0, ValueError), (-math.inf, ValueError), (math.nan, ValueError), ("6", TypeError), (None, TypeError)],
)
def test_thresholds_that_make_no_sense(threshold: Any, error: type[Exception]) -> None:
    weight, layer, part = torch.randn(4, 3), layer_of(), Int8Linear(3, 4)
    part.threshold = threshold
    for give in (
        lambda: layer_of(threshold),
        lambda: setattr(layer, "threshold", threshold),
        lambda: Int8Linear(3, 4, threshold=threshold),
        lambda: Int8Linear.from_float(nn.Linear(3, 4), threshold),
        lambda: Int8Linear.quantized(nn.Linear(3, 4), threshold),
        lambda: llm_int8_linear(torch.randn(2, 3), weight, threshold=threshold),
        lambda: part(torch.randn(2, 3)),
    ):
        with pytest.raises(error, match="threshold: expected a number ≥ 0, got"):
            give()


@pytest.mark.parametrize("change", ["hook on act", "hook on dense2", "another activation", "pruning", "spectral norm"])
def test_changed_parts_are_respected(change: str) -> None:
    layer, seen = layer_of(), []
    if change == "hook on act":
        layer.act.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    elif change == "hook on dense2":
        layer.dense2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    elif change == "another activation":
        layer.act = nn.SiLU()
    elif change == "pruning":
        prune.random_unstructured(layer.dense2, "weight", amount=0.5)
    else:
        layer.float()  # spectral norm needs a dtype that a CPU multiplies
        parametrizations.spectral_norm(layer.dense2)
        layer.eval()
    x = torch.randn(ROWS, DIM)
    y = layer(x)
    assert seen == ([(ROWS, HIDDEN)] if "hook" in change else [])
    assert torch.equal(y, layer.dense2(layer.act(layer.dense1(x))))
    if change in ("pruning", "spectral norm"):
        with pytest.raises(RuntimeError, match="quantize_: the weight is computed"):
            layer.dense2.quantize_()


# --- int8 weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_quantize_stores_int8_and_float32_scales(bias: bool) -> None:
    layer = layer_of(bias=bias)
    expected = {name: quantize_rows(getattr(layer, name).weight.detach()) for name in LINEARS}
    assert layer.quantize_() is layer
    state = layer.state_dict()
    names = [f"{part}.{name}" for part in LINEARS for name in (*(["bias"] if bias else []), "weight", "weight_scale")]
    assert list(state) == names
    for part, (steps, scale) in expected.items():
        assert torch.equal(state[f"{part}.weight"], steps)
        assert torch.equal(state[f"{part}.weight_scale"], scale)
        assert state[f"{part}.weight"].dtype is torch.int8
    assert {name for name, _ in layer.named_parameters()} == ({"dense1.bias", "dense2.bias"} if bias else set())
    assert layer.dense1.is_quantized
    assert "weight=int8" in repr(layer)
    assert torch.equal(layer.quantize_().dense1.weight, expected["dense1"][0])  # once is enough


@pytest.mark.parametrize("threshold", [0.0, 1e6])
def test_without_outliers_quantize_changes_no_bit(threshold: float) -> None:
    layer, x = layer_of(threshold), torch.randn(2, ROWS, DIM)
    expected = layer(x)
    assert torch.equal(layer.quantize_()(x), expected)


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0])
def test_threshold_applies_to_int8_weights(threshold: float) -> None:
    layer, x = layer_of(threshold).quantize_(), torch.randn(ROWS, DIM) * 2
    assert torch.equal(layer(x), by_parts(layer, x))


def test_gradient_flows_to_the_input_and_the_bias_but_not_to_int8_weights() -> None:
    layer, x = layer_of().quantize_(), torch.randn(ROWS, DIM, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.dense1.bias.grad is not None
    assert layer.dense1.weight.grad is None
    assert not layer.dense1.weight.requires_grad


def test_a_float_layer_is_quantized_from_its_own_weights() -> None:
    layer, x = FusedDenseGELUDense(DIM, HIDDEN, threshold=2.0), torch.randn(ROWS, DIM)
    steps, scale = quantize_rows(layer.dense1.weight.detach())
    bias, expected = layer.dense1.bias, layer(x)
    layer.quantize_()
    assert torch.equal(layer.dense1.weight, steps)
    assert torch.equal(layer.dense1.weight_scale, scale)
    assert layer.dense1.bias is bias
    assert (layer(x) - expected).norm() < 0.02 * expected.norm()


def test_quantize_refuses_parts_that_it_would_lose() -> None:
    layer = FusedDenseGELUDense(DIM, HIDDEN)
    layer.dense2 = nn.Sequential(nn.Linear(HIDDEN, DIM))
    with pytest.raises(TypeError, match="expected dense2 to be"):
        layer.quantize_()
    assert type(layer.dense1) is nn.Linear


# --- compiled, autocast, exported -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "threshold", "quantized"),
    [("inductor", 1.5, False), ("inductor", 0.0, True), ("fuse_pass", 1.5, False)],
)
def test_compiles_in_one_graph(backend: str, threshold: float, quantized: bool) -> None:
    layer, x = layer_of(threshold), torch.randn(ROWS, DIM, requires_grad=True)
    layer = layer.quantize_() if quantized else layer
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    leaves = [x, *layer.parameters()]
    y, expected = compiled(x), layer(x)
    # Inductor's erf may differ from eager's in the last bit, which can move a hidden value by one step.
    tolerance = 2e-2 * expected.abs().max().item()
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    for ours, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=tolerance)


def test_compiled_training_sees_the_weights_of_every_step() -> None:
    layer, x = layer_of(), torch.randn(64, DIM)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(4):
        loss = F.mse_loss(compiled(x), x)
        torch.testing.assert_close(loss, F.mse_loss(layer(x), x), rtol=1e-3, atol=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_autocast(dtype: torch.dtype, quantized: bool) -> None:
    layer, x = layer_of(), torch.randn(ROWS, DIM)
    exact = float_twin(layer)(x)
    layer = layer.quantize_() if quantized else layer
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype is dtype
    assert (y - exact).norm() < 0.03 * exact.norm()
    y.float().sum().backward()
    assert layer.dense1.bias.grad.dtype is torch.float32
    assert quantized or layer.dense1.weight.grad.dtype is torch.float16


@pytest.mark.parametrize("quantized", [False, True])
def test_exports(quantized: bool) -> None:
    layer, x = layer_of(), torch.randn(ROWS, DIM)
    layer = layer.quantize_() if quantized else layer
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    assert any("llm_int8_linear" in str(node.target) for node in program.graph.nodes)
    for given in (x, torch.randn(11, DIM)):
        torch.testing.assert_close(program.module()(given), layer(given))


def test_modes_and_transforms() -> None:
    layer, x = layer_of(), torch.randn(4, 3, DIM)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    checkpointed = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(checkpointed, expected)
    each = torch.stack([layer(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(layer)(x), each)
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(leaf).sum(), leaf)[0])


@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 7), torch.ones(3, DIM, dtype=torch.long), torch.tensor(1.0)],
    ids=["size", "integers", "0-d"],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_wrong_input_raises_what_torch_raises(x: Tensor, quantized: bool) -> None:
    layer = layer_of().quantize_() if quantized else layer_of().float()
    with pytest.raises(RuntimeError) as expected:
        nn.Linear(DIM, HIDDEN)(x)
    with pytest.raises(RuntimeError) as ours:
        layer(x)
    assert str(ours.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="device"):
        layer(torch.randn(3, DIM, device="meta"))
