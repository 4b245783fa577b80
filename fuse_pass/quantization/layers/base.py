"""What every Quantized* layer has: a `QuantSpec`, and the way from and to its `torch.nn` counterpart.

A layer is a subclass of its `torch.nn` counterpart with the same state dict. Master weights stay parameters of their
own dtype; quantisation is functional, inside forward, so that optimizers, checkpoints and tied weights work as ever.

Scales come from each tensor until `set_scale` (mostly called by `fuse_pass.calibrate`) gives one to a site. A static
scale is a buffer, `input_scale`, with `input_zero_point` for asymmetric integers; a learned one is a parameter. Its
gradient is that of 1902.08153:

    dy/ds = y/s − x/s inside, quant_min or quant_max outside; times g = 1 / sqrt(N · quant_max)
    dy/dx = 1 inside, 0 outside

N counts the elements that share the scale, without the batch. For asymmetric integers (unsigned in the paper)
quant_max − quant_min, the largest unsigned number, takes the place of quant_max.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from fuse_pass.inductor import private
from fuse_pass.numerics.formats import FloatFormat, Format
from fuse_pass.numerics.spec import SITES, QuantSpec, Site, spec_of
from fuse_pass.quantization.functional import quantize_at
from fuse_pass.quantization.observers import MeanMagnitude
from fuse_pass.quantization.saving import warn_if_not_described

_SCALE_NAMES = tuple((site, f"{site}_scale", f"{site}_zero_point") for site in SITES)


class QuantizedLayer(nn.Module):
    """Mixin of all quantised layers; comes before the `torch.nn` class in the bases.

    Attributes:
        spec: what is quantised, and how; may be replaced at any time, after `clear_scales()` where scales were set.
        float_type: the `torch.nn` class that the layer stands for.
    """

    float_type: ClassVar[type[nn.Module]]
    spec: QuantSpec
    _watch: Callable[[str, Tensor], None] | None = None

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
        layer._start_learning()
        return cast(Self, layer)

    def to_float(self) -> nn.Module:
        """The `torch.nn` layer with the same settings, hooks, buffers and parameters, without scales."""
        module: nn.Module = _with_the_contents_of(self, self.float_type)
        _drop_scales(module)
        del module.spec
        return module

    def set_scale(self, site: str, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Gives a site its scale: a parameter where the spec says "learned", else a buffer.

        Args:
            site: one of `SITES` but "grad".
            scale: real value of one step, above 0; of the shape that `Granularity` tells, `[]` for one scale.
            zero_point: integer that stands for 0, of the same shape; for asymmetric integers alone.

        Raises:
            ValueError: the spec has no scale to be set at this site, or a zero point is missing or has no meaning.
        """
        described: Site | None = getattr(self.spec, site) if site in SITES else None
        if described is None or not described.takes_scale or site == "grad":
            raise ValueError(f"{type(self).__name__}.set_scale: {site!r} takes no scale; spec: {self.spec}")
        if described.format.has_zero_point is not (zero_point is not None):
            word = "needs a" if described.format.has_zero_point else "has no"
            raise ValueError(f"{type(self).__name__}.set_scale: {described.format.name} {word} zero point")
        like = next(self.parameters(), scale)
        scale = scale.detach().clone().to(like.device)
        _remove(self, f"{site}_scale", f"{site}_zero_point")
        if described.scale == "learned":
            self.register_parameter(f"{site}_scale", nn.Parameter(scale))
        else:
            self.register_buffer(f"{site}_scale", scale)
        if zero_point is not None:
            self.register_buffer(f"{site}_zero_point", zero_point.detach().clone().to(like.device))

    def clear_scales(self) -> None:
        """Back to the state before calibration."""
        _drop_scales(self)

    def _start_learning(self) -> None:
        """The learned scale of a single weight needs no data: 2·mean|w| / sqrt(quant_max); its range if asymmetric."""
        site = self.spec.weight
        weight = None if site is None else whole_weight(self, site)
        if site is None or site.scale != "learned" or weight is None or weight.numel() == 0 or weight.is_meta:
            return
        observer = MeanMagnitude(site.granularity)
        observer.observe(weight)
        self.set_scale("weight", *observer.scale_and_zero_point(site.format))

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        warn_if_not_described(self)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for site, scale_name, zero_name in _SCALE_NAMES:
            described: Site | None = getattr(self.spec, site)
            if prefix + scale_name not in state_dict or getattr(self, scale_name, None) is not None:
                continue
            if described is not None and described.takes_scale:
                self.set_scale(site, state_dict[prefix + scale_name], state_dict.get(prefix + zero_name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _at(self, name: str, x: Tensor) -> Tensor:
        site: Site | None = getattr(self.spec, name)
        if site is None:
            return x
        if self._watch is not None:  # by `calibrate`, before there are scales
            self._watch(name, x)
            return quantize_at(replace(site, scale="dynamic") if site.takes_scale else site, x)
        return quantize_at(site, x, *self.qparams_at(name, x))

    def qparams_at(self, name: str, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scale and zero point that were set for a site; None where they are taken from x, or there are none.

        Raises:
            RuntimeError: they should have been set, and were not.
        """
        site: Site = getattr(self.spec, name)
        scale = getattr(self, f"{name}_scale", None) if site.takes_scale else None
        if scale is None and site.needs_scale:
            raise RuntimeError(
                f"{type(self).__name__}: the scale of {name!r} is {site.scale} and has no value yet; call "
                "fuse_pass.calibrate(model, batches) first"
            )
        zero_point = None if scale is None else getattr(self, f"{name}_zero_point", None)
        if scale is not None and site.scale == "learned":
            scale = _learned_step(site, x, scale, batched=name not in ("weight", "bias"))
        return scale, zero_point

    def _input(self, x: Tensor) -> Tensor:
        return self._at("input", x)

    def _weight(self, weight: Tensor) -> Tensor:
        return self._at("weight", weight)

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self._at("bias", bias)

    def _state(self, state: Tensor) -> Tensor:
        return self._at("state", state)

    def _output(self, y: Tensor) -> Tensor:
        y = self._at("output", y)
        return y if self.spec.grad is None else quantize_gradient(y, self.spec.grad)

    def extra_repr(self) -> str:
        described = super().extra_repr()
        scaled = [site for site, scale_name, _ in _SCALE_NAMES if getattr(self, scale_name, None) is not None]
        suffix = f", scales: {', '.join(scaled)}" if scaled else ""
        return f"{described}, quantized: {self.spec}{suffix}" if described else f"quantized: {self.spec}{suffix}"


class ByFormat(QuantizedLayer):
    """A quantised layer that takes all arguments of its `torch.nn` layer, and the format by keyword.

    Args:
        *of_torch: arguments of the `torch.nn` layer.
        exp_bits: exponent bits of an IEEE-like format, 2…11.
        sig_bits: its explicit fraction bits, 1…52.
        rmode: rounding mode, by number 0…9 or name.
        spec: what is quantised and how, instead of the format above.
        **options: further arguments of the `torch.nn` layer.
    """

    def __init__(
        self,
        *of_torch: Any,
        exp_bits: int = 5,
        sig_bits: int = 10,
        rmode: int | str = 1,
        spec: QuantSpec | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*of_torch, **options)
        self.spec = spec or simulated(exp_bits, sig_bits, rmode)


def simulated(exp_bits: int, sig_bits: int, rmode: int | str) -> QuantSpec:
    """The spec of a layer that is constructed by the bits of an IEEE-like format."""
    return QuantSpec.uniform(FloatFormat(exp_bits, sig_bits), rounding=rmode)


def whole_weight(layer: nn.Module, site: Site) -> Tensor | None:
    """The weight that stands behind the site; None where there are several, as in attention and recurrent layers.

    None, too, for an embedding whose rows have scales of their own: they are quantised after they are looked up.
    """
    weight = getattr(layer, "weight", None)
    by_row = isinstance(layer, nn.Embedding) and site.granularity.kind != "tensor"
    return weight if isinstance(weight, Tensor) and not by_row else None


def _learned_step(site: Site, x: Tensor, scale: Tensor, *, batched: bool) -> Tensor:
    """`scale` with the gradient g · dy/ds, 1902.08153 §2.2; `batched`: dimension 0 of x is none of the layer's."""
    sharing = x.numel() // max(scale.numel() * (x.shape[0] if batched and x.dim() > 1 else 1), 1)
    step: Tensor = _ScaledGradient.apply(scale, (max(sharing, 1) * site.format.steps) ** -0.5)
    # The sign of a step has no meaning, and a step of 0 would be the end of training.
    return step.abs().clamp(min=torch.finfo(step.dtype).tiny)


class _ScaledGradient(torch.autograd.Function):
    """The scale itself; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


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
        return quantize_at(ctx.site, grads[0]), None


def _with_the_contents_of(module: nn.Module, new_type: type[nn.Module]) -> Any:
    """A module of another type that shares parameters, buffers and sub-modules, but none of the dictionaries."""
    twin = new_type.__new__(new_type)
    contents = {
        name: value.copy() if isinstance(value, (dict, list)) else value for name, value in vars(module).items()
    }
    twin.__dict__.update(contents)
    return twin


def _drop_scales(module: nn.Module) -> None:
    for _, *names in _SCALE_NAMES:
        _remove(module, *names)


def _remove(module: nn.Module, *names: str) -> None:
    for tensors in (private.buffers_of(module), private.parameters_of(module)):
        for name in names:
            tensors.pop(name, None)
