"""Faults that a fused operator or the pass could have, each to be put in while a test looks for it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import decomposition

import fuse_pass.ops  # noqa: F401 - registers the ops
from fuse_pass.patterns import pattern
from fuse_pass.report import Reason
from fuse_pass.testing import plants
from fuse_pass.testing.builder import Builder

Arguments = dict[str, Any]
Change = Callable[[Callable[..., Any], Arguments], Any]


@dataclass(frozen=True)
class Fault:
    """Something wrong with an op.

    Attributes:
        name: what.
        op: name of the op.
        change: called with the right body and its arguments by name.
        plants: what to look at; by default whatever has the op.
    """

    name: str
    op: str
    change: Change
    plants: tuple[Callable[[Builder], Any], ...] = ()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        op = getattr(torch.ops.fuse_pass, self.op).default
        names = [argument.name for argument in op._schema.arguments]
        defaults = {argument.name: argument.default_value for argument in op._schema.arguments}
        body = decomposition.decompositions[op]

        def right(**arguments: Any) -> Any:
            return body(*(arguments[name] for name in names))

        def faulty(*values: Any, **named: Any) -> Any:
            return self.change(right, {**defaults, **dict(zip(names, values, strict=False)), **named})

        library = torch.library.Library("fuse_pass", "IMPL")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
                library.impl(self.op, faulty, "CompositeExplicitAutograd", allow_override=True)
            with mock.patch.dict(decomposition.decompositions, {op: faulty}):  # what Inductor makes of the op
                decomposition.fast_random_decomps.cache_clear()
                yield
        finally:
            library._destroy()
            decomposition.fast_random_decomps.cache_clear()


def with_argument(name: str, new: Callable[[Any], Any]) -> Change:
    """One argument is another; None stays None."""
    return lambda call, a: call(**{**a, name: None if a[name] is None else new(a[name])})


def without(name: str) -> Change:
    return lambda call, a: call(**{**a, name: None})


def with_result(index: int, new: Callable[[Tensor, Arguments], Tensor]) -> Change:
    """One result of several is another."""

    def change(call: Callable[..., Any], a: Arguments) -> Any:
        results = list(call(**a))
        results[index] = new(results[index], a)
        return tuple(results)

    return change


def first_seen(name: str) -> Change:
    """The argument is remembered from the first call and taken ever after."""
    seen: dict[Any, Tensor] = {}

    def remembered(value: Tensor) -> Tensor:
        return seen.setdefault((value.data_ptr(), tuple(value.shape)) if value.dim() else "seed", value.clone())

    return with_argument(name, remembered)


def unscaled(name: str) -> Change:
    """Without 1 / (1 - p), seen from an argument that the result is linear in."""
    return lambda call, a: call(
        **{**a, name: a[name] * (1 - a["p"]) if a["seed"] is not None and a["p"] < 1 else a[name]}
    )


def and_also(effect: Callable[[Arguments], Any]) -> Change:
    def change(call: Callable[..., Any], a: Arguments) -> Any:
        result = call(**a)
        effect(a)
        return result

    return change


def square_transposed(weight: Tensor) -> Tensor:
    return weight.t() if weight.shape[0] == weight.shape[1] else weight


def other_layout(y: Tensor) -> Tensor:
    return y.transpose(0, 1).contiguous().transpose(0, 1) if y.dim() > 1 else y


def of_zeros(value: Tensor, a: Arguments) -> Tensor:
    return torch.zeros_like(value)


def with_leaky_relu(b: Builder) -> None:
    plants.dense_act_dense(b, forms=("F.leaky_relu({h}, 0.2)", "F.elu({h}, 0.7)"))


def with_gelu(b: Builder) -> None:
    plants.dense_act_dense(b, forms=plants.EXACT_GELUS)


def square(b: Builder) -> None:
    v = b.fit(b.pick(), (3, 5, 24))
    w1, w2 = b.parameter(24, 24), b.parameter(24, 24)
    b.emit(f"F.linear(F.gelu(F.linear({v.name}, {w1})), {w2})", v.shape)


def chain(b: Builder) -> None:
    v = b.pick()
    for _ in range(3):
        w, bias = b.parameter(v.width, v.width), b.parameter(v.width)
        v = b.emit(f"F.linear({v.name}, {w}, {bias})", v.shape, like=v)
        v = b.emit(f"F.gelu({v.name})", v.shape, like=v)
    b.emit(f"F.linear({v.name}, {b.parameter(8, v.width)})", (*v.shape[:-1], 8))


def cast_norm(b: Builder) -> None:
    v = b.pick()
    b.emit(f"F.layer_norm((F.dropout({v.name}, 0.25, self.training) * 1 + {v.name}).double(), ({v.width},))", v.shape,
           base=False)  # fmt: skip


FAULTS: tuple[Fault, ...] = (
    Fault("eps times ten", "dropout_norm", with_argument("eps", lambda eps: 10 * eps)),
    Fault("rstd without eps", "dropout_norm", with_argument("eps", lambda eps: 0.0)),
    Fault("p ignored", "dropout_norm", with_argument("p", lambda p: 0.0)),
    Fault("twice p", "dropout_norm", with_argument("p", lambda p: min(2 * p, 1.0))),
    Fault("no 1/(1-p)", "dropout_norm", unscaled("x")),
    Fault("another mask than the seed's", "dropout_norm", with_argument("seed", lambda seed: seed + 1)),
    Fault("mask of the first call in every call", "dropout_norm", first_seen("seed")),
    Fault("one dimension too many normalised", "dropout_norm", with_argument(
        "normalized_dims", lambda n: min(n + 1, 2))),
    Fault("residual counted twice", "dropout_norm", with_argument("residual", lambda r: 2 * r)),
    Fault("residual lost", "dropout_norm", with_argument("residual", torch.zeros_like)),
    Fault("norm weight not applied", "dropout_norm", without("weight")),
    Fault("norm bias not applied", "dropout_norm", without("bias")),
    Fault("mean not subtracted", "dropout_norm", lambda call, a: (
        lambda y, z, statistics: ((y + statistics.prod(0)).to(y.dtype), z, statistics))(*call(**a))),
    Fault("RMSNorm for LayerNorm's square", "dropout_norm", with_result(0, lambda y, a: y.abs())),
    Fault("second output lost", "dropout_norm", with_result(1, of_zeros)),
    Fault("the sum read again is its own input", "dropout_norm", with_result(1, lambda z, a: a["x"].clone())),
    Fault("a result in another dtype", "dropout_norm", with_result(
        0, lambda y, a: y.to(torch.float64 if y.dtype is torch.float32 else torch.float32))),
    Fault("a result in another layout", "dropout_norm", with_result(0, lambda y, a: other_layout(y))),
    Fault("cast before the norm dropped", "dropout_norm", without("norm_dtype"), (cast_norm,)),
    Fault("input overwritten", "dropout_norm", and_also(lambda a: a["x"].detach().mul_(1.5))),
    Fault("a random number drawn on the way", "dropout_norm", and_also(lambda a: torch.rand(1))),
    Fault("NaN taken for 0", "dropout_norm", with_result(0, lambda y, a: torch.nan_to_num(y))),
    Fault("gradient of the norm weight missing", "dropout_norm_backward", with_result(2, of_zeros)),
    Fault("gradient of the norm bias missing", "dropout_norm_backward", with_result(3, of_zeros)),
    Fault("gradient of the residual missing", "dropout_norm_backward", with_result(0, of_zeros)),
    Fault("gradient through the second output missing", "dropout_norm_backward", lambda call, a: call(
        **{**a, "grad_z": None if a["grad_y"] is not None else a["grad_z"]})),
    Fault("no 1/(1-p) in backward", "dropout_norm_backward", with_result(
        1, lambda grad, a: grad * (1 - a["p"]) if a["p"] < 1 else grad)),
    Fault("mask of backward is another", "dropout_norm_backward", with_argument("seed", lambda seed: seed + 1)),
    Fault("tanh for erf", "dense_act_dense", with_argument(
        "activation", lambda name: "gelu_tanh" if name == "gelu" else name), (with_gelu,)),
    Fault("first bias dropped", "dense_act_dense", without("bias1")),
    Fault("second bias dropped", "dense_act_dense", without("bias2")),
    Fault("square weight transposed", "dense_act_dense", with_argument("weight2", square_transposed), (square,)),
    Fault("p ignored between the products", "dense_act_dense", with_argument("p", lambda p: 0.0)),
    Fault("no 1/(1-p) between the products", "dense_act_dense", unscaled("weight2")),
    Fault("stale mask between the products", "dense_act_dense", first_seen("seed")),
    Fault("stale weight", "dense_act_dense", first_seen("weight1")),
    Fault("constant of the activation", "dense_act_dense", with_argument(
        "act_arguments", lambda constants: [1.01 * constant for constant in constants]), (with_leaky_relu,)),
    Fault("pre-activation lost for backward", "dense_act_dense", with_result(1, of_zeros)),
    Fault("bias dropped in inference", "dense_act_dense_inference", without("bias1")),
    Fault("another activation in inference", "dense_act_dense_inference", with_argument(
        "activation", lambda name: "relu")),
    Fault("bias dropped in a chain", "act_dense", without("bias2"), (chain,)),
    Fault("gradient of the first bias missing", "dense_act_dense_backward", with_result(2, of_zeros)),
    Fault("gradient of the second weight missing", "dense_act_dense_backward", with_result(3, of_zeros)),
    Fault("gradient of the input missing", "dense_act_dense_backward", with_result(0, of_zeros)),
    Fault("derivative of another activation", "dense_act_dense_backward", with_argument("activation", lambda n: "relu"),
          (with_gelu,)),
    Fault("no mask in backward", "dense_act_dense_backward", with_argument("p", lambda p: 0.0)),
    Fault("gradient of a square weight transposed", "dense_act_dense_backward", with_result(
        3, lambda grad, a: square_transposed(grad) if grad.dim() == 2 else grad), (square,)),
    Fault("gradient in a chain missing", "act_dense_backward", with_result(1, of_zeros), (chain,)),
)  # fmt: skip

IGNORED: tuple[Reason, ...] = (
    Reason.CONSTANTS,  # alpha, the constants of an activation
    Reason.SECOND_READER,
    Reason.MUTATION,
    Reason.DTYPES,
    Reason.LAYOUT,
    Reason.AUTOCAST,
    Reason.GRAD_MODE,
    Reason.BROADCAST,
    Reason.FALLBACK_RANDOM,
)


@contextlib.contextmanager
def ignoring(reason: Reason) -> Iterator[None]:
    """The pass fuses in spite of one reason to decline."""
    original = pattern._problem

    def problem(*arguments: Any) -> Any:
        found = original(*arguments)
        return None if found is not None and found.reason is reason and arguments[2].outputs else found

    with mock.patch.object(pattern, "_problem", problem):
        yield
