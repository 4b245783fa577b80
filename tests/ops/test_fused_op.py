"""What follows from the declaration of an op: schema, calls of all kinds, gradients of every order, autocast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

from fuse_pass.ops import fused_op, library
from fuse_pass.ops.arguments import Role, Seed, Size, Weight
from fuse_pass.ops.fused_op import FusedOp, Gradients, ProductOp


@dataclass(frozen=True)
class Power:
    """Settings that ops share."""

    seed: Seed | None
    exponent: float
    offsets: Sequence[float] = ()

    def of(self, x: Tensor) -> Tensor:
        return x**self.exponent + sum(self.offsets)


@dataclass(frozen=True)
class Scaled(FusedOp):
    """y = weight · x ** exponent, and what was multiplied."""

    results = ("y", "powers")
    recompute = True

    x: Tensor
    weight: Weight
    bias: Tensor | None
    power: Power

    def forward(self) -> tuple[Tensor, Tensor]:
        powers = self.power.of(self.x)
        y = self.weight * powers
        return (y.clone() if self.bias is None else y + self.bias), powers

    def shapes(self) -> tuple[Tensor, Tensor]:
        return torch.empty_like(self.x), torch.empty_like(self.x)

    def saved(self, results: tuple[Tensor, ...], needed: Set[str]) -> ScaledGradients:
        return ScaledGradients(self.x, self.weight, results[1], self.power)

    def formula(self) -> Tensor:
        y = self.weight * self.power.of(self.x)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class ScaledGradients(Gradients):
    of = ("x", "weight", "bias")

    x: Tensor
    weight: Tensor
    powers: Tensor
    power: Power

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        asked_for.append(frozenset(needed))
        grads = {}
        if "x" in needed:
            grads["x"] = grad_y * self.weight * self.power.exponent * self.x ** (self.power.exponent - 1)
        if "weight" in needed:
            grads["weight"] = grad_y * self.powers
        if "bias" in needed:
            grads["bias"] = grad_y.clone()
        return grads

    def like(self, name: str, grad_y: Tensor) -> Tensor:
        return torch.empty_like(grad_y)


@dataclass(frozen=True)
class Shifted(ProductOp):
    """y = x + count, with a gradient that needs no op of its own."""

    x: Tensor
    count: Size = 1
    flag: bool = False

    def forward(self) -> Tensor:
        return self.x + self.count

    def shapes(self) -> Tensor:
        return torch.empty_like(self.x)

    def saved(self, results: tuple[Tensor, ...], needed: Set[str]) -> ShiftedGradients:
        return ShiftedGradients(3.0)


@dataclass(frozen=True)
class ShiftedGradients(Gradients):
    of = ("x",)

    factor: float

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        return {"x": grad_y * self.factor}


@dataclass(frozen=True)
class Doubled(FusedOp):
    """y = 2 x: one argument, one gradient."""

    x: Tensor

    def forward(self) -> Tensor:
        return 2 * self.x

    def shapes(self) -> Tensor:
        return torch.empty_like(self.x)


@dataclass(frozen=True)
class DoubledGradients(Gradients):
    of = ("x",)

    x: Tensor

    def backward(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        return {"x": 2 * grad_y}

    def differentiable(self, needed: Set[str], grad_y: Tensor) -> dict[str, Tensor]:
        return self.backward(needed, grad_y)


asked_for: list[frozenset[str]] = []


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """The two ops, in a library that goes with the test."""
    with (
        torch.library._scoped_library("fuse_pass", "FRAGMENT") as fragment,
        mock.patch.object(library, "LIBRARY", fragment),
    ):
        fused_op.register("test_scaled", Scaled, ScaledGradients)
        fused_op.register("test_shifted", Shifted, ShiftedGradients)
        fused_op.register("test_doubled", Doubled, DoubledGradients)
        yield


def schema(name: str) -> str:
    return str(getattr(torch.ops.fuse_pass, name).default._schema)


def test_schemas() -> None:
    power = "Tensor? seed, float exponent, "
    assert schema("test_scaled") == (
        f"fuse_pass::test_scaled(Tensor x, Tensor weight, Tensor? bias, {power}float[] offsets=[]) "
        "-> (Tensor y, Tensor powers)"
    )
    # What was kept stands between the gradient and the mask; defaults come last.
    assert schema("test_scaled_backward") == (
        f"fuse_pass::test_scaled_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor powers, {power}"
        "bool[3] output_mask, float[] offsets=[]) -> (Tensor, Tensor, Tensor)"
    )
    assert schema("test_shifted") == "fuse_pass::test_shifted(Tensor x, SymInt count=1, bool flag=False) -> Tensor"
    assert not hasattr(torch.ops.fuse_pass, "test_shifted_backward")


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight, bias = (torch.rand(3, dtype=dtype) + 0.5 for _ in range(3))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def test_gradients_of_both_orders() -> None:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.fuse_pass.test_scaled(x, weight, bias, None, 3.0, [0.25])[0]

    assert torch.autograd.gradcheck(call, example())
    assert torch.autograd.gradgradcheck(call, example())


def test_a_single_gradient() -> None:
    call = torch.ops.fuse_pass.test_doubled
    assert schema("test_doubled_backward").endswith("bool[1] output_mask) -> Tensor")
    assert torch.autograd.gradcheck(call, example()[:1])
    assert torch.autograd.gradgradcheck(call, example()[:1])
    torch.library.opcheck(call.default, example()[:1])


def test_a_gradient_that_is_no_op() -> None:
    x = example()[0]
    (grad,) = torch.autograd.grad(torch.ops.fuse_pass.test_shifted(x, 2).sum(), x, create_graph=True)
    assert grad.tolist() == [3.0] * 3


def test_only_what_is_needed_is_computed() -> None:
    x, weight, bias = example()
    asked_for.clear()
    y, powers = torch.ops.fuse_pass.test_scaled(x.detach(), weight, bias, None, 3.0)
    assert not powers.requires_grad
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert asked_for == [{"weight", "bias"}]
    assert torch.equal(grad, powers)


def test_a_tensor_is_saved_once() -> None:
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor
    ):
        torch.ops.fuse_pass.test_scaled(*example(), None, 3.0)
    assert len(packed) == 4  # x, weight, bias for second derivatives, and the powers


@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias: bool) -> None:
    x, weight, bias = example()
    arguments = (x, weight, bias if with_bias else None, None, 3.0)
    torch.library.opcheck(torch.ops.fuse_pass.test_scaled.default, arguments, {"offsets": [0.5]})
    torch.library.opcheck(torch.ops.fuse_pass.test_shifted.default, (x,), {"flag": True})


def test_autocast_casts_every_argument() -> None:
    x = torch.ones(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.fuse_pass.test_shifted(x).dtype is torch.bfloat16
        assert torch.ops.fuse_pass.test_shifted(x.double()).dtype is torch.float64
    assert torch.ops.fuse_pass.test_shifted(x).dtype is torch.float32


def test_a_call_in_a_graph_is_read_by_name() -> None:
    graph = Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    node = graph.call_function(torch.ops.fuse_pass.test_scaled.default, (x, weight, None), {"exponent": 2.0, "seed": x})
    assert fused_op.declaration_of(node.target) is Scaled
    call = Scaled.of_call(node.args, node.kwargs)
    assert call == Scaled(x, weight, None, Power(x, 2.0, ()))  # type: ignore[arg-type]
    assert call.arguments() == [x, weight, None, x, 2.0, ()]
    assert call.of_role(Role.WEIGHT) == [weight]
    assert call.of_role(Role.SEED) == [x]
    assert call.named()["exponent"] == 2.0
    assert call.replaced({"exponent": 4.0}).power.exponent == 4.0


def test_other_targets_have_no_declaration() -> None:
    assert fused_op.declaration_of(torch.relu) is None
    assert fused_op.declaration_of(torch.ops.aten.relu.default) is None
    assert fused_op.declaration_of("relu") is None


def test_a_field_may_not_hide_a_method() -> None:
    @dataclass(frozen=True)
    class Hiding(FusedOp):
        x: Tensor
        arguments: Tensor  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"Hiding\.arguments: all declarations have an attribute of this name"):
        fused_op.register("test_hiding", Hiding)


def test_a_field_may_not_hide_what_an_op_is_made_of() -> None:
    @dataclass(frozen=True)
    class Hiding(FusedOp):
        x: Tensor
        saved: Tensor  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"Hiding\.saved: all declarations have an attribute of this name"):
        fused_op.register("test_hiding", Hiding)


def test_a_type_that_no_schema_knows() -> None:
    @dataclass(frozen=True)
    class Strange(FusedOp):
        x: Tensor
        names: Sequence[str]

    with pytest.raises(TypeError, match=r"names: expected one of .*Tensor.*, got .*Sequence\[str\]"):
        fused_op.register("test_strange", Strange)


def test_an_empty_tensor_and_no_gradient() -> None:
    empty = torch.empty(0, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(torch.ops.fuse_pass.test_doubled(empty).sum(), empty)
    assert grad.shape == (0,)
    assert not torch.ops.fuse_pass.test_doubled(empty.detach()).requires_grad
    with torch.no_grad():
        assert not torch.ops.fuse_pass.test_doubled(empty).requires_grad
