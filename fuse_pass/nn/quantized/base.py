"""What every Quantized* layer has: a `QuantSpec`, and the way from and to its `torch.nn` counterpart.

A layer is a subclass of its `torch.nn` counterpart with the same state dict. Master weights stay parameters of their
own dtype; quantisation is functional, inside forward, so that optimizers, checkpoints and tied weights work as ever.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from fuse_pass.formats import FloatFormat, Format
from fuse_pass.quantize import fake_quantize
from fuse_pass.spec import QuantSpec, Site, spec_of


class QuantizedLayer(nn.Module):
    """Mixin of all quantised layers; comes before the `torch.nn` class in the bases.

    Attributes:
        spec: what is quantised, and how; may be replaced at any time.
        float_type: the `torch.nn` class that the layer stands for.
    """

    float_type: ClassVar[type[nn.Module]]
    spec: QuantSpec

    @classmethod
    def from_float(cls, module: nn.Module, spec: QuantSpec | Format | str) -> Self:
        """The quantised layer with the settings, hooks, buffers and *the same parameters* as `module`.

        Raises:
            TypeError: `module` is not exactly of the type that this layer stands for.
        """
        if type(module) is not cls.float_type:
            raise TypeError(
                f"{cls.__name__}.from_float: expected a {cls.float_type.__name__}, got a {type(module).__name__}"
            )
        layer = _with_the_contents_of(module, cls)
        layer.spec = spec_of(spec)
        return cast(Self, layer)

    def to_float(self) -> nn.Module:
        """The `torch.nn` layer with the same settings, hooks, buffers and parameters."""
        module: nn.Module = _with_the_contents_of(self, self.float_type)
        del module.spec
        return module

    def _input(self, x: Tensor) -> Tensor:
        return at(self.spec.input, x)

    def _weight(self, weight: Tensor) -> Tensor:
        return at(self.spec.weight, weight)

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else at(self.spec.bias, bias)

    def _state(self, state: Tensor) -> Tensor:
        return at(self.spec.state, state)

    def _output(self, y: Tensor) -> Tensor:
        y = at(self.spec.output, y)
        return y if self.spec.grad is None else quantize_gradient(y, self.spec.grad)

    def extra_repr(self) -> str:
        described = super().extra_repr()
        return f"{described}, quantized: {self.spec}" if described else f"quantized: {self.spec}"


def simulated(exp_bits: int, sig_bits: int, rmode: int | str) -> QuantSpec:
    """The spec of a layer that is constructed by the bits of an IEEE-like format."""
    return QuantSpec.uniform(FloatFormat(exp_bits, sig_bits), rounding=rmode)


def at(site: Site | None, x: Tensor) -> Tensor:
    """`x` as quantised at a site; `x` itself where there is none."""
    if site is None:
        return x
    return fake_quantize(x, site.format, rounding=site.rounding, granularity=site.granularity, clip_grad=site.clip_grad)


def quantize_gradient(y: Tensor, site: Site) -> Tensor:
    """`y` itself, whose gradient is quantised on the way back."""
    result: Tensor = _QuantizedGradient.apply(y, site)
    return result


class _QuantizedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, site: Site) -> Tensor:
        ctx.site = site
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return at(ctx.site, grads[0]), None


def _with_the_contents_of(module: nn.Module, new_type: type[nn.Module]) -> Any:
    """A module of another type that shares parameters, buffers and sub-modules, but none of the dictionaries."""
    twin = new_type.__new__(new_type)
    contents = {
        name: value.copy() if isinstance(value, (dict, list)) else value for name, value in vars(module).items()
    }
    twin.__dict__.update(contents)
    return twin
