"""The activations that may stand between two Linear layers: one row says all that the package knows of one.

To add one, add its row: how it is called, or written out; its value and gradient; the constants that it takes. A
gradient is a function of the pre-activation `h` alone, so that nothing else is saved. Half types are computed in
float32 inside each aten call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.numerics.tensors import accumulation_dtype

aten = torch.ops.aten

QUICK_GELU_SLOPE = 1.702
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

Arguments = Sequence[float]


def _unary(input: Any) -> None: ...
def _unary_in_place_option(input: Any, inplace: Any = False) -> None: ...
def _softplus(input: Any, beta: Any = 1, threshold: Any = 20) -> None: ...
def _gelu(input: Any, approximate: Any = "none") -> None: ...
def _leaky_relu(input: Any, negative_slope: Any = 0.01, inplace: Any = False) -> None: ...
def _elu(input: Any, alpha: Any = 1.0, inplace: Any = False) -> None: ...
def _prelu_call(input: Any, weight: Any) -> None: ...
def _hardtanh(input: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: Any = False) -> None: ...
def _relu6(input: Any, inplace: Any = False, min_val: Any = 0.0, max_val: Any = 6.0) -> None: ...


@dataclass(frozen=True)
class Called:
    """How a graph calls an activation by name.

    Attributes:
        targets: functions, operators, and names of tensor methods.
        parameters: their signature.
        in_place: those that write into their first argument, by the target that does not.
    """

    targets: tuple[Any, ...]
    parameters: Callable[..., None] = _unary
    in_place: Mapping[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        name: key in `ACTIVATIONS`.
        forward: `(h, arguments, weight) → act(h)`; `weight` holds what is learned, and is None where nothing is.
        backward: `(grad, h, arguments, weight) → grad * act'(h)`.
        weight_backward: `(grad, h, weight) →` the gradient of `weight`, in its shape and in at least float32.
        called: the ways in which a graph calls it; none for one that is always written out.
        constants: the parameters that are its `arguments`, in order.
        given: the parameters that must have these values for it to be this one; its `kind` is the name of the call.
        kind: what calls of it are in a graph's canonical form; its own name unless several share one.
        forms: it as a function of one tensor, in every way that is not the same algebra; of learned numbers as well,
            which `weight` holds in the order of the parameters.
        post_op: oneDNN's `(attribute, algorithm)` where it can follow a matrix product in one call; none for relu,
            hardtanh and hardsigmoid, which turn NaN into a number there.
    """

    name: str
    forward: Callable[[Tensor, Arguments, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Arguments, Tensor | None], Tensor]
    weight_backward: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    called: tuple[Called, ...] = ()
    constants: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""
    forms: tuple[Callable[..., Tensor], ...] = ()
    post_op: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or self.name)


def _quick_gelu_backward(grad: Tensor, h: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(QUICK_GELU_SLOPE * h)
    # In this order no product overflows: for a huge h the factor `1 - sigmoid` is an exact 0.
    return grad * (sigmoid + QUICK_GELU_SLOPE * (h * (sigmoid * (1 - sigmoid))))


def _learned(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError("expected the learned numbers of the activation as its weight, got None")
    return weight


def _prelu(h: Tensor, arguments: Arguments, weight: Tensor | None) -> Tensor:
    return torch.where(h > 0, h, _learned(weight) * h)


def _prelu_backward(grad: Tensor, h: Tensor, arguments: Arguments, weight: Tensor | None) -> Tensor:
    return torch.where(h > 0, grad, _learned(weight) * grad)


def _prelu_weight_backward(grad: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """A slope for all, or one for each channel of the last dimension."""
    wide = accumulation_dtype(h.dtype)
    of_slope = torch.where(h > 0, 0.0, grad.to(wide) * h.to(wide))
    return (of_slope.sum() if weight.numel() == 1 else of_slope.sum(0)).view(weight.shape)


def _star_relu_forward(h: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
    y: Tensor = scale * (aten.relu(h) * aten.relu(h))
    return y + bias[0] if bias else y


def _star_relu_weight_backward(grad: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    wide = accumulation_dtype(h.dtype)
    grad, positive = grad.to(wide), aten.relu(h.to(wide))
    of_scale = (grad * (positive * positive)).sum()
    return torch.stack([of_scale, grad.sum()][: weight.numel()])


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Runs a formula of several steps with one rounding at the end for half types, like a single aten kernel."""

    def run(*tensors: Tensor) -> Tensor:
        dtype = tensors[0].dtype
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        return function(*(tensor.to(wide) for tensor in tensors)).to(dtype)

    return run


_quick_gelu = _in_float32(lambda h: h * torch.sigmoid(QUICK_GELU_SLOPE * h))
_quick_gelu_grad = _in_float32(_quick_gelu_backward)
_relu_squared = _in_float32(lambda h: aten.relu(h) * aten.relu(h))


_relu_squared_grad = _in_float32(lambda grad, h: aten.threshold_backward(grad * (2 * aten.relu(h)), h, 0))
_star_relu = _in_float32(_star_relu_forward)
_star_relu_grad = _in_float32(lambda grad, h, scale: aten.threshold_backward(grad * (scale * (2 * aten.relu(h))), h, 0))
# Written out by relu6 they have its gradient, which is that of the middle where h is NaN; and aten's hardsigmoid knows
# 1/6 in float32 only.
_hardswish_of_relu6 = _in_float32(lambda h: h * aten.hardtanh(h + 3, 0, 6) / 6)
_hardswish_of_relu6_grad = _in_float32(
    lambda grad, h: grad * aten.hardtanh(h + 3, 0, 6) / 6 + aten.hardtanh_backward(grad * h / 6, h + 3, 0, 6)
)
_hardsigmoid_of_relu6 = _in_float32(lambda h: aten.hardtanh(h + 3, 0, 6) / 6)
_hardsigmoid_of_relu6_grad = _in_float32(lambda grad, h: aten.hardtanh_backward(grad / 6, h + 3, 0, 6))
_aten_elu = aten.elu.default
_elu_backward = aten.elu_backward.default

ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation(
            "gelu",
            lambda h, a, w: aten.gelu(h),
            lambda g, h, a, w: aten.gelu_backward(g, h),
            called=(Called((F.gelu, aten.gelu.default), _gelu),),
            given={"approximate": "none"},
            forms=(lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),),
            post_op=("gelu", "none"),
        ),
        Activation(
            "gelu_tanh",
            lambda h, a, w: aten.gelu(h, approximate="tanh"),
            lambda g, h, a, w: aten.gelu_backward(g, h, approximate="tanh"),
            called=(Called((F.gelu, aten.gelu.default), _gelu),),
            given={"approximate": "tanh"},
            kind="gelu",
            forms=(lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),),
            post_op=("gelu", "tanh"),
        ),
        Activation(
            "quick_gelu",
            lambda h, a, w: _quick_gelu(h),
            lambda g, h, a, w: _quick_gelu_grad(g, h),
            forms=(lambda x: x * torch.sigmoid(1.702 * x), lambda x: x / (1 + torch.exp(-1.702 * x))),
        ),
        Activation(
            "relu",
            lambda h, a, w: aten.relu(h),
            lambda g, h, a, w: aten.threshold_backward(g, h, 0),
            called=(
                Called(
                    (F.relu, torch.relu, "relu", aten.relu.default),
                    _unary_in_place_option,
                    {torch.relu_: torch.relu, F.relu_: F.relu, "relu_": "relu"},
                ),
            ),
        ),
        Activation(
            "relu_squared",
            lambda h, a, w: _relu_squared(h),
            lambda g, h, a, w: _relu_squared_grad(g, h),
            forms=(lambda x: F.relu(x) ** 2,),
        ),
        # MetaFormer (Yu et al., 2022): `weight` holds the scale, and the bias where there is one.
        Activation(
            "star_relu",
            lambda h, a, w: _star_relu(h, *_learned(w).unbind()),
            lambda g, h, a, w: _star_relu_grad(g, h, _learned(w)[0]),
            _star_relu_weight_backward,
            forms=(lambda x, scale, bias: scale * F.relu(x) ** 2 + bias, lambda x, scale: scale * F.relu(x) ** 2),
        ),
        Activation(
            "leaky_relu",
            lambda h, a, w: aten.leaky_relu(h, a[0]),
            lambda g, h, a, w: aten.leaky_relu_backward(g, h, a[0], False),
            called=(Called((F.leaky_relu, aten.leaky_relu.default), _leaky_relu, {F.leaky_relu_: F.leaky_relu}),),
            constants=("negative_slope",),
            post_op=("leaky_relu", ""),
        ),
        Activation(
            "prelu",
            _prelu,
            _prelu_backward,
            _prelu_weight_backward,
            called=(Called((F.prelu, torch.prelu, "prelu"), _prelu_call),),
        ),
        Activation(
            "elu",
            lambda h, a, w: _aten_elu(h, a[0]),
            lambda g, h, a, w: _elu_backward(g, a[0], 1, 1, False, h),
            called=(Called((F.elu,), _elu, {F.elu_: F.elu}),),
            constants=("alpha",),
        ),
        Activation(
            "selu",
            lambda h, a, w: _aten_elu(h, SELU_ALPHA, SELU_SCALE),
            lambda g, h, a, w: _elu_backward(g, SELU_ALPHA, SELU_SCALE, 1, False, h),
            called=(
                Called(
                    (F.selu, torch.selu, aten.selu.default),
                    _unary_in_place_option,
                    {torch.selu_: torch.selu, F.selu_: F.selu},
                ),
            ),
        ),
        Activation(
            "silu",
            lambda h, a, w: aten.silu(h),
            lambda g, h, a, w: aten.silu_backward(g, h),
            called=(Called((F.silu, aten.silu.default), _unary_in_place_option),),
            forms=(lambda x: x * torch.sigmoid(x), lambda x: x / (1 + torch.exp(-x))),
            post_op=("swish", ""),
        ),
        Activation(
            "mish",
            lambda h, a, w: aten.mish(h),
            lambda g, h, a, w: aten.mish_backward(g, h),
            called=(Called((F.mish, aten.mish.default), _unary_in_place_option),),
            forms=(
                lambda x: x * torch.tanh(F.softplus(x)),
                lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
                lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))),
            ),
        ),
        Activation(
            "hardswish",
            lambda h, a, w: aten.hardswish(h),
            lambda g, h, a, w: aten.hardswish_backward(g, h),
            called=(Called((F.hardswish, aten.hardswish.default), _unary_in_place_option),),
            post_op=("hardswish", ""),
        ),
        Activation(
            "hardsigmoid",
            lambda h, a, w: aten.hardsigmoid(h),
            lambda g, h, a, w: aten.hardsigmoid_backward(g, h),
            called=(Called((F.hardsigmoid, aten.hardsigmoid.default), _unary_in_place_option),),
        ),
        Activation(
            "hardswish_of_relu6",
            lambda h, a, w: _hardswish_of_relu6(h),
            lambda g, h, a, w: _hardswish_of_relu6_grad(g, h),
            forms=(lambda x: x * F.relu6(x + 3) / 6,),
            post_op=("hardswish", ""),
        ),
        Activation(
            "hardsigmoid_of_relu6",
            lambda h, a, w: _hardsigmoid_of_relu6(h),
            lambda g, h, a, w: _hardsigmoid_of_relu6_grad(g, h),
            forms=(lambda x: F.relu6(x + 3) / 6,),
        ),
        Activation(
            "hardtanh",
            lambda h, a, w: aten.hardtanh(h, a[0], a[1]),
            lambda g, h, a, w: aten.hardtanh_backward(g, h, a[0], a[1]),
            called=(
                Called((F.hardtanh, aten.hardtanh.default), _hardtanh, {F.hardtanh_: F.hardtanh}),
                Called((F.relu6,), _relu6),
            ),
            constants=("min_val", "max_val"),
        ),
        Activation(
            "sigmoid",
            lambda h, a, w: aten.sigmoid(h),
            lambda g, h, a, w: aten.sigmoid_backward(g, aten.sigmoid(h)),
            called=(
                Called(
                    (torch.sigmoid, "sigmoid", F.sigmoid, torch.special.expit, aten.sigmoid.default),
                    in_place={torch.sigmoid_: torch.sigmoid, "sigmoid_": "sigmoid"},
                ),
            ),
            post_op=("sigmoid", ""),
        ),
        Activation(
            "tanh",
            lambda h, a, w: aten.tanh(h),
            lambda g, h, a, w: aten.tanh_backward(g, aten.tanh(h)),
            called=(
                Called(
                    (torch.tanh, "tanh", F.tanh, aten.tanh.default),
                    in_place={torch.tanh_: torch.tanh, "tanh_": "tanh"},
                ),
            ),
            post_op=("tanh", ""),
        ),
        Activation(
            "softplus",
            lambda h, a, w: aten.softplus(h, a[0], a[1]),
            lambda g, h, a, w: aten.softplus_backward(g, h, a[0], a[1]),
            called=(Called((F.softplus, aten.softplus.default), _softplus),),
            constants=("beta", "threshold"),
        ),
    )
}
