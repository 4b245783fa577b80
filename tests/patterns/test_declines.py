"""Declines because of constants, dtypes, layouts, order and what is missing; the files beside have the other reasons.

Each test asserts that nothing fuses, that the report names the cause, and that the result is still eager's.
"""

from __future__ import annotations

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

GELU = F.gelu


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(GELU(F.linear(x, w1, b1)), w2, b2)


def add_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x + r, (24,), w, b)


# --- constants


@pytest.mark.parametrize("cubic", [0.0447, 0.04471, 0.044])
def test_dense_written_out_gelu_with_another_constant(cubic: float) -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.linear(x, w1, b1)
        a = 0.5 * h * (1 + torch.tanh(0.7978845608028654 * (h + cubic * h**3)))
        return F.linear(a, w2, b2)

    (decline,) = assert_declines(function, dense_inputs(), Reason.CONSTANTS, "a")
    assert "gelu_tanh" in decline.detail


@pytest.mark.parametrize("scale", [{"alpha": 2}, {"beta": 2}, {"beta": 0.5}])
def test_dense_addmm_with_other_factors_is_no_linear(scale: dict[str, float]) -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return torch.addmm(b2, GELU(F.linear(x, w1, b1)), w2.T, **scale)  # type: ignore[call-overload,no-any-return]

    assert_declines(function, dense_inputs(rows=(5,)), Reason.NO_SECOND_LINEAR, "gelu")


def test_dense_bias_with_a_factor_is_no_bias() -> None:
    """The product alone is the second Linear; the scaled addition stays behind it."""

    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return torch.add(GELU(F.linear(x, w1, b1)) @ w2.T, b2, alpha=2)

    found = assert_fused_like_eager(function, dense_inputs(), counts={"dense_act_dense": 1})
    assert found.calls("dense_act_dense")[0].args[4] is None


@pytest.mark.parametrize("alpha", [2, 0.5, -1])
def test_norm_of_a_scaled_sum(alpha: float) -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(torch.add(x, r, alpha=alpha), (24,), w, b)

    assert_declines(function, norm_inputs(), Reason.CONSTANTS, "add")


def test_norm_over_a_size_that_is_known_only_at_run_time() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x + r, (x.shape[-1],))

    found = assert_fused_like_eager(function, norm_inputs(), dynamic=True)
    assert found.report.counts() or {d.reason for d in found.report.declines} == {Reason.CONSTANTS}
    assert_fused_like_eager(function, norm_inputs(), dynamic=False, counts={"dropout_norm": 1})


# --- tensors


class TaggedTensor(Tensor):
    """A subclass that only renames the type; Dynamo computes with what is inside."""


class DoublingTensor(Tensor):
    """A subclass with a GELU of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func is F.gelu else result


@pytest.mark.parametrize(("subclass", "matches"), [(TaggedTensor, 1), (DoublingTensor, 0)])
@pytest.mark.parametrize("name", ["x", "weight1", "bias2"])
def test_dense_subclass_by_torch_function(name: str, subclass: type[Tensor], matches: int) -> None:
    inputs = {key: value.detach() for key, value in dense_inputs().items()}
    inputs[name] = inputs[name].as_subclass(subclass)
    found = capture(mlp, *inputs.values())
    expected = torch.compile(mlp, backend="eager")(*inputs.values())
    # The bias reaches GELU through the sum, as the input does; the second bias comes after it.
    assert found.report.counts()["dense_act_dense"] == (1 if name == "bias2" else matches)
    assert type(found.output) is type(expected)
    # Before torch 2.12, what Dynamo itself traces has another value than eager here.
    truth = mlp(*inputs.values()) if torch.__version__ >= "2.12" else expected
    torch.testing.assert_close(found.output.as_subclass(Tensor), truth.as_subclass(Tensor))


def jagged(width: int) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2, width), torch.randn(4, width)], layout=torch.jagged)


def test_dense_nested_tensor() -> None:
    _, *weights = (value.detach() for value in dense_inputs().values())
    x = jagged(8)
    found = capture(mlp, x, *weights)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.SUBCLASS, "l_x_")
    assert torch.equal(found.output.values(), mlp(x, *weights).values())


def test_norm_nested_tensor() -> None:
    x = jagged(24)
    found = capture(lambda x: F.layer_norm(x + x, (24,)), x)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.SUBCLASS, "l_x_")
    assert torch.equal(found.output.values(), F.layer_norm(x + x, (24,)).values())


@pytest.mark.parametrize("position", ["first", "second"])
def test_dense_bias_of_another_dtype_promotes(position: str) -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        if position == "first":
            return GELU(x @ w1.T + b1.float()).to(x.dtype) @ w2.T + b2
        return GELU(x @ w1.T + b1) @ w2.T + b2.float()

    assert_declines(function, dense_inputs(dtype=torch.bfloat16), Reason.DTYPES, "")


def test_dense_bias_outside_autocast_promotes() -> None:
    """`x @ w` runs in bfloat16 under autocast, `+ b` in the float32 of the bias; a Linear does both in bfloat16."""

    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return GELU(x @ w1.T + b1) @ w2.T + b2

    (decline,) = assert_declines(function, dense_inputs(), Reason.DTYPES, "add")
    assert "torch.float32" in decline.detail
    assert "torch.bfloat16" in decline.detail


def test_dense_bias_of_another_dtype_added_in_place() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = x @ w1.T
        h += b1.float()
        return F.linear(GELU(h), w2, b2)

    assert_declines(function, dense_inputs(dtype=torch.bfloat16), Reason.DTYPES, "h")


def test_dense_cast_between() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(GELU(F.linear(x, w1, b1).float()).to(x.dtype), w2, b2)

    assert_declines(function, dense_inputs(dtype=torch.bfloat16), Reason.DTYPES, "")


def test_dense_bits_reinterpreted_inside_the_activation() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.linear(x, w1, b1)
        return F.linear(h * torch.sigmoid(h.view(torch.int32)), w2, b2)

    with torch.no_grad():
        found = capture(function, *dense_inputs().values())
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.DTYPES, "view")


def test_dense_complex() -> None:
    def function(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        h = F.linear(x, w1)
        return F.linear(h * torch.sigmoid(h), w2)

    x, w1, _, w2, _ = (a.detach().to(torch.complex64) for a in dense_inputs().values())
    found = capture(function, x, w1, w2)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.DTYPES, "l_x_")
    assert torch.equal(found.output, function(x, w1, w2))


def test_norm_residual_of_integers() -> None:
    x, _, w, b = (a.detach() for a in norm_inputs().values())
    r = torch.arange(24)
    found = capture(add_norm, x, r, w, b)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.DTYPES, "l_r_")
    assert torch.equal(found.output, add_norm(x, r, w, b))


def test_norm_wider_scalar_tensor_does_not_promote() -> None:
    x, _, w, b = (a.detach() for a in norm_inputs().values())
    r = torch.tensor(2.0, dtype=torch.float64)
    found = capture(add_norm, x, r, w, b)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.DTYPES, "add")
    assert torch.equal(found.output, add_norm(x, r, w, b))


@pytest.mark.parametrize("last", [torch.float32, torch.float64])
def test_norm_rounding_cast_before_a_widening_one(last: torch.dtype) -> None:
    x, r, *_ = (a.detach() for a in norm_inputs().values())

    def function(x: Tensor, r: Tensor) -> Tensor:
        return F.layer_norm((x + r).to(torch.bfloat16).to(last), (24,))

    torch.testing.assert_close(capture(function, x, r).output, function(x, r))


def test_norm_on_another_device_than_the_sum() -> None:
    def function(x: Tensor, r: Tensor) -> Tensor:
        return F.layer_norm((x + r).to("meta"), (24,))

    x, r, *_ = (a.detach() for a in norm_inputs().values())
    found = capture(function, x, r)
    assert found.report.counts() == {}
    assert_blames(found.report, Reason.DEVICES, "")
    assert found.output.device.type == "meta"


# --- layout and broadcast


def test_dense_heads_are_split_between() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(GELU(F.linear(x, w1, b1)).view(3, 5, 2, 12), w2[:, :12], b2)

    assert_declines(function, dense_inputs(), Reason.LAYOUT, "view")


def test_dense_rows_are_rearranged_between() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(GELU(F.linear(x, w1, b1)).view(-1, 24), w2, b2)

    assert_declines(function, dense_inputs(), Reason.LAYOUT, "linear_1")


def test_dense_transpose_between_is_no_match() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(GELU(F.linear(x, w1, b1)).transpose(0, 1), w2, b2)

    assert_declines(function, dense_inputs(), Reason.NO_SECOND_LINEAR, "gelu")


@pytest.mark.parametrize("shape", [(3, 5, 24), (2, 24, 24)])
def test_dense_prelu_slopes_of_another_dimension(shape: tuple[int, ...]) -> None:
    """PReLU's slopes go along dimension 1; the shape (2, 24, 24) hides that from a comparison of sizes."""

    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.linear(x, w1, b1)
        a = F.prelu(h.view(shape), b1[: shape[1]]).view(h.shape)
        return F.linear(a, w2, b2)

    assert_declines(function, dense_inputs(rows=(shape[0] * shape[1],)), Reason.LAYOUT, "getitem")


def test_dense_activation_multiplies_a_value_with_its_reshaped_self() -> None:
    """`h.view(1, 4) * sigmoid(h)` is an outer product, although it reads like SiLU."""

    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.linear(x, w1[:1])
        return F.linear(h.view(1, 4) * torch.sigmoid(h), w2[:, :4], b2)

    assert_declines(function, dense_inputs(rows=(4,)), Reason.LAYOUT, "mul")


def test_norm_of_a_broadcast_dropout() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(F.dropout(x[:1], 1.0) + r, (24,), w, b)

    assert_declines(function, norm_inputs(), Reason.BROADCAST, "getitem")


def test_norm_of_two_broadcast_operands() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x[:, :1] + r[:1], (24,), w, b)

    assert_declines(function, norm_inputs(), Reason.BROADCAST, "getitem")


# --- order, overlap, and what is missing


def test_norm_weight_is_computed_from_the_sum() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = x + r
        scale = w + z.mean()
        return F.layer_norm(z, (24,), scale, b)

    assert_declines(function, norm_inputs(), Reason.ORDER, "scale")


def test_norm_of_every_head_behind_a_view() -> None:
    """Its constants are right; it is the view that divides the rows."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm((x + r).view(3, 5, 4, 6), (6,), w[:6], b[:6])

    assert_declines(function, norm_inputs(), Reason.LAYOUT, "view")


@pytest.mark.parametrize("rest", [torch.sin, lambda a: a, lambda a: a @ a.mT], ids=["sin", "output", "product"])
def test_dense_no_second_linear(rest: Any) -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return rest(torch.relu(F.linear(x, w1, b1)) * 1)  # type: ignore[no-any-return]

    assert_declines(function, dense_inputs(), Reason.NO_SECOND_LINEAR, "relu")


def test_opaque_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        found = capture(layer, x)
        assert found.report.counts() == {}
        assert_blames(found.report, Reason.OPAQUE, "")
        torch.testing.assert_close(found.output, layer(x))
