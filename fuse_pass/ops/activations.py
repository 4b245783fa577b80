"""The activations that may stand between two Linear layers: forward, gradient, and their name in oneDNN.

Gradients are functions of the pre-activation `h` alone, so that nothing else is saved. Half types are computed in
float32 inside each aten call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten

QUICK_GELU_SLOPE = 1.702
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

Arguments = Sequence[float]


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        name: key in `ACTIVATIONS`.
        forward: `(h, arguments, weight) → act(h)`; `weight` is PReLU's slope, None elsewhere.
        backward: `(grad, h, arguments, weight) → grad * act'(h)`.
        post_op: oneDNN's `(attribute, algorithm)` where it can follow a matrix product in one call; none for relu,
            hardtanh and hardsigmoid, which turn NaN into a number there.
    """

    name: str
    forward: Callable[[Tensor, Arguments, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Arguments, Tensor | None], Tensor]
    post_op: tuple[str, str] | None = None


def _quick_gelu_backward(grad: Tensor, h: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(QUICK_GELU_SLOPE * h)
    # In this order no product overflows: for a huge h the factor `1 - sigmoid` is an exact 0.
    return grad * (sigmoid + QUICK_GELU_SLOPE * (h * (sigmoid * (1 - sigmoid))))


def _prelu(h: Tensor, arguments: Arguments, weight: Tensor | None) -> Tensor:
    assert weight is not None
    return torch.where(h > 0, h, weight * h)


def _prelu_backward(grad: Tensor, h: Tensor, arguments: Arguments, weight: Tensor | None) -> Tensor:
    assert weight is not None
    return torch.where(h > 0, grad, weight * grad)


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
# Written out by relu6 they have its gradient, which is that of the middle where h is NaN; and aten's hardsigmoid knows
# 1/6 in float32 only.
_hardswish_of_relu6 = _in_float32(lambda h: h * aten.hardtanh(h + 3, 0, 6) / 6)
_hardswish_of_relu6_grad = _in_float32(
    lambda grad, h: grad * aten.hardtanh(h + 3, 0, 6) / 6 + aten.hardtanh_backward(grad * h / 6, h + 3, 0, 6)
)
_hardsigmoid_of_relu6 = _in_float32(lambda h: aten.hardtanh(h + 3, 0, 6) / 6)
_hardsigmoid_of_relu6_grad = _in_float32(lambda grad, h: aten.hardtanh_backward(grad / 6, h + 3, 0, 6))
_elu = aten.elu.default
_elu_backward = aten.elu_backward.default

ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation(
            "gelu",
            lambda h, a, w: aten.gelu(h),
            lambda g, h, a, w: aten.gelu_backward(g, h),
            ("gelu", "none"),
        ),
        Activation(
            "gelu_tanh",
            lambda h, a, w: aten.gelu(h, approximate="tanh"),
            lambda g, h, a, w: aten.gelu_backward(g, h, approximate="tanh"),
            ("gelu", "tanh"),
        ),
        Activation(
            "quick_gelu",
            lambda h, a, w: _quick_gelu(h),
            lambda g, h, a, w: _quick_gelu_grad(g, h),
        ),
        Activation(
            "relu",
            lambda h, a, w: aten.relu(h),
            lambda g, h, a, w: aten.threshold_backward(g, h, 0),
        ),
        Activation(
            "relu_squared",
            lambda h, a, w: _relu_squared(h),
            lambda g, h, a, w: _relu_squared_grad(g, h),
        ),
        Activation(
            "leaky_relu",
            lambda h, a, w: aten.leaky_relu(h, a[0]),
            lambda g, h, a, w: aten.leaky_relu_backward(g, h, a[0], False),
            ("leaky_relu", ""),
        ),
        Activation(
            "prelu",
            _prelu,
            _prelu_backward,
        ),
        Activation(
            "elu",
            lambda h, a, w: _elu(h, a[0]),
            lambda g, h, a, w: _elu_backward(g, a[0], 1, 1, False, h),
        ),
        Activation(
            "selu",
            lambda h, a, w: _elu(h, SELU_ALPHA, SELU_SCALE),
            lambda g, h, a, w: _elu_backward(g, SELU_ALPHA, SELU_SCALE, 1, False, h),
        ),
        Activation(
            "silu",
            lambda h, a, w: aten.silu(h),
            lambda g, h, a, w: aten.silu_backward(g, h),
            ("swish", ""),
        ),
        Activation(
            "mish",
            lambda h, a, w: aten.mish(h),
            lambda g, h, a, w: aten.mish_backward(g, h),
        ),
        Activation(
            "hardswish",
            lambda h, a, w: aten.hardswish(h),
            lambda g, h, a, w: aten.hardswish_backward(g, h),
            ("hardswish", ""),
        ),
        Activation(
            "hardsigmoid",
            lambda h, a, w: aten.hardsigmoid(h),
            lambda g, h, a, w: aten.hardsigmoid_backward(g, h),
        ),
        Activation(
            "hardswish_of_relu6",
            lambda h, a, w: _hardswish_of_relu6(h),
            lambda g, h, a, w: _hardswish_of_relu6_grad(g, h),
            ("hardswish", ""),
        ),
        Activation(
            "hardsigmoid_of_relu6",
            lambda h, a, w: _hardsigmoid_of_relu6(h),
            lambda g, h, a, w: _hardsigmoid_of_relu6_grad(g, h),
        ),
        Activation(
            "hardtanh",
            lambda h, a, w: aten.hardtanh(h, a[0], a[1]),
            lambda g, h, a, w: aten.hardtanh_backward(g, h, a[0], a[1]),
        ),
        Activation(
            "sigmoid",
            lambda h, a, w: aten.sigmoid(h),
            lambda g, h, a, w: aten.sigmoid_backward(g, aten.sigmoid(h)),
            ("sigmoid", ""),
        ),
        Activation(
            "tanh",
            lambda h, a, w: aten.tanh(h),
            lambda g, h, a, w: aten.tanh_backward(g, aten.tanh(h)),
            ("tanh", ""),
        ),
        Activation(
            "softplus",
            lambda h, a, w: aten.softplus(h, a[0], a[1]),
            lambda g, h, a, w: aten.softplus_backward(g, h, a[0], a[1]),
        ),
    )
}
