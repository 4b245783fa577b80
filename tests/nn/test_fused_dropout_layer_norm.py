"""FusedDropoutLayerNorm against `nn.Dropout` and `nn.LayerNorm`, with the mask recovered from the sum."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse_pass import FusedDropoutLayerNorm
from fuse_pass.numerics import random_bits
from fuse_pass.ops.seed import seed
from tests.precision import assert_as_exact_as_eager

DIM = 24


def run(function: Any, parameters: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of `function(*inputs)`."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    parameters.zero_grad()
    y = function(*inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    grads = {f"grad {name}": p.grad.clone() for name, p in parameters.named_parameters()}
    return {"y": y.detach(), **{f"grad of input {i}": x.grad for i, x in enumerate(inputs)}, **grads}


@pytest.mark.parametrize("shape", [(1, 512), (10, 512)])
def test_examples_of_the_seed(shape: tuple[int, ...]) -> None:
    assert FusedDropoutLayerNorm(dim=512)(torch.randn(shape)).shape == shape
    custom = FusedDropoutLayerNorm(512, dropout=0.2, eps=1e-6, elementwise_affine=False)
    assert custom(torch.randn(shape)).shape == shape
    assert list(custom.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_values_and_gradients(dtype: torch.dtype, with_residual: bool, p: float) -> None:
    """The same mask in forward and backward: the reference uses the mask of the forward pass for both."""
    layer = FusedDropoutLayerNorm(DIM, p).to(dtype)
    nn.init.normal_(layer.layer_norm.weight)
    nn.init.normal_(layer.layer_norm.bias)
    inputs = [torch.randn(3, 5, DIM).to(dtype) for _ in range(2 if with_residual else 1)]
    torch.manual_seed(11)
    keep = random_bits.keep_mask(seed(device=torch.device("cpu")), 15, DIM, p).view(3, 5, DIM)
    assert p == 0 or 0.5 < keep.double().mean() < 0.9

    def reference(norm: nn.LayerNorm) -> Any:
        def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
            dropped = torch.where(keep, x / (1 - p), 0.0)
            return norm(dropped if residual is None else residual + dropped)

        return call

    wide = copy.deepcopy(layer.layer_norm).double()
    exact = run(reference(wide), wide, *(x.double() for x in inputs))
    eager = run(reference(layer.layer_norm), layer.layer_norm, *inputs)
    torch.manual_seed(11)
    ours = run(layer, layer, *inputs)
    renamed = {"grad weight": "grad layer_norm.weight", "grad bias": "grad layer_norm.bias"}
    for name, value in exact.items():
        assert_as_exact_as_eager(ours[renamed.get(name, name)], eager[name], value, name)


@pytest.mark.parametrize("shape", [(DIM,), (7, DIM), (2, 3, DIM), (2, 3, 4, DIM), (0, DIM)])
def test_any_rank_and_empty_batches(shape: tuple[int, ...]) -> None:
    layer = FusedDropoutLayerNorm(DIM, 0.2)
    x = torch.randn(shape, requires_grad=True)
    y, total = layer(x, x, return_sum=True)
    (y.sum() + total.sum()).backward()
    assert y.shape == total.shape == x.grad.shape == shape
    layer.eval()
    torch.testing.assert_close(layer(x), layer.layer_norm(x))


def test_several_normalised_dimensions() -> None:
    layer = FusedDropoutLayerNorm((5, DIM), 0.4)
    x, residual = torch.randn(3, 5, DIM), torch.randn(3, 5, DIM)
    y, total = layer(x, residual, return_sum=True)
    torch.testing.assert_close(y, layer.layer_norm(total))
    dropped = total - residual
    assert ((dropped == 0) | ((dropped - x / 0.6).abs() < 1e-5)).all()


def test_eval_and_p_0_draw_nothing() -> None:
    x = torch.randn(3, DIM)
    for layer in (FusedDropoutLayerNorm(DIM, 0.5).eval(), FusedDropoutLayerNorm(DIM, 0.0)):
        before = torch.get_rng_state()
        torch.testing.assert_close(layer(x, x), layer.layer_norm(x + x))
        assert torch.equal(torch.get_rng_state(), before)


def test_p_1_gives_the_bias() -> None:
    layer = FusedDropoutLayerNorm(DIM, 1.0)
    nn.init.normal_(layer.layer_norm.bias)
    x = torch.full((3, DIM), torch.inf)
    y, total = layer(x, return_sum=True)
    assert torch.equal(total, torch.zeros_like(x))
    assert torch.equal(y, layer.layer_norm.bias.expand_as(y))


def test_manual_seed_reproduces() -> None:
    layer, x = FusedDropoutLayerNorm(DIM, 0.5), torch.randn(9, DIM)

    def with_seed(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(with_seed(1), with_seed(1))
    assert not torch.equal(with_seed(1), with_seed(2))
    assert not torch.equal(layer(x), layer(x))


def test_return_sum_without_residual_or_dropout_is_the_input() -> None:
    layer, x = FusedDropoutLayerNorm(DIM).eval(), torch.randn(3, DIM)
    y, total = layer(x, return_sum=True)
    assert total is x
    torch.testing.assert_close(y, layer.layer_norm(x))


@pytest.mark.parametrize("dropout", [-0.1, 1.1, math.nan])
def test_bad_probability(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout: expected a probability between 0 and 1"):
        FusedDropoutLayerNorm(DIM, dropout)


@pytest.mark.parametrize("eps", [-1e-5, math.nan])
def test_bad_eps(eps: float) -> None:
    with pytest.raises(ValueError, match="eps"):
        FusedDropoutLayerNorm(DIM, eps=eps)


@pytest.mark.parametrize(
    "x", [torch.randn(3, 7), torch.randn(3, DIM).double(), torch.tensor(1.0)], ids=["size", "dtype", "0-d"]
)
def test_wrong_input_raises_what_torch_raises(x: Tensor) -> None:
    layer = FusedDropoutLayerNorm(DIM, 0.1)
    with pytest.raises(RuntimeError) as expected:
        layer.layer_norm(layer.dropout(x))
    with pytest.raises(RuntimeError) as ours:
        layer(x)
    assert str(ours.value) == str(expected.value)


def test_residual_of_another_shape() -> None:
    layer, x = FusedDropoutLayerNorm(DIM).eval(), torch.randn(3, DIM)
    torch.testing.assert_close(layer(x, torch.ones(DIM)), layer.layer_norm(x + 1))
    with pytest.raises(RuntimeError, match="must match the size"):
        layer(x, torch.randn(2, DIM))


def test_mixed_dtypes_follow_torch() -> None:
    layer = FusedDropoutLayerNorm(DIM).eval()
    half = torch.randn(3, DIM).bfloat16()
    assert layer(half).dtype is layer.layer_norm(half).dtype is torch.bfloat16
    y, total = layer(half, torch.randn(3, DIM), return_sum=True)
    assert y.dtype is total.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(half).dtype is layer.layer_norm(half).dtype


def test_hooks_and_changed_parts_are_respected() -> None:
    layer, seen = FusedDropoutLayerNorm(DIM, 0.0), []
    layer.layer_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    layer(torch.randn(3, DIM))
    assert seen == [(3, DIM)]
    layer = FusedDropoutLayerNorm(DIM, 1.0)
    layer.dropout = nn.Identity()
    x = torch.randn(3, DIM)
    torch.testing.assert_close(layer(x), layer.layer_norm(x))


def test_only_the_dropout_in_training() -> None:
    """`module.dropout.eval()` switches the dropout off, as in the unfused pair."""
    layer, x = FusedDropoutLayerNorm(DIM, 0.9), torch.randn(3, DIM)
    layer.dropout.eval()
    torch.testing.assert_close(layer(x), layer.layer_norm(x))


def test_eager_and_compiled_agree_bit_for_bit_in_the_mask() -> None:
    layer, x = FusedDropoutLayerNorm(DIM, 0.5), torch.randn(9, DIM)
    torch.manual_seed(3)
    _, eager = layer(x, return_sum=True)
    for backend in ("inductor", "fuse_pass"):
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        compiled(x, return_sum=True)
        torch.manual_seed(3)
        _, total = compiled(x, return_sum=True)
        kept = (total != 0).double().mean()
        assert 0.3 < kept < 0.7
        torch.testing.assert_close(total, torch.where(total != 0, 2 * x, 0.0))
    assert 0.3 < (eager != 0).double().mean() < 0.7


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition", "inductor", "fuse_pass"])
def test_two_layers_draw_two_masks(backend: str) -> None:
    """Common subexpressions of a training graph are merged; two draws of a seed are none."""
    layers = nn.ModuleList(FusedDropoutLayerNorm(DIM, 0.5) for _ in range(2))
    x = torch.randn(64, DIM, requires_grad=True)

    @torch.compile(backend=backend, fullgraph=True)
    def both(x: Tensor) -> list[Tensor]:
        return [layer(x, return_sum=True)[1] for layer in layers]

    first, second = both(x)
    agreement = ((first != 0) == (second != 0)).double().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.5 / (64 * DIM) ** 0.5


def test_modes_transforms_copies_and_export() -> None:
    layer, x = FusedDropoutLayerNorm(DIM, 0.2), torch.randn(4, 3, DIM)
    layer.eval()
    expected = layer.layer_norm(x + x)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x, x), expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x, x), expected)
    torch.testing.assert_close(torch.utils.checkpoint.checkpoint(layer, x, x, use_reentrant=False), expected)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x, x), expected)
    program = torch.export.export(layer, (x, x))
    torch.testing.assert_close(program.module()(x, x), expected)


def test_second_derivatives() -> None:
    layer = FusedDropoutLayerNorm(5, 0.0).double()
    x, residual = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(layer, (x, residual))
