"""`fuse_pass.calibrate`: runs batches through a converted model and gives its layers static scales.

Scales are set where one tensor stands behind a site:

    input           what enters the layer; query, key and value of an attention together have one
    weight, bias    the parameter itself, in layers with one of each
    output          the result, in layers with one

Dynamic scales remain where one site serves several tensors (weights, biases, projections, scores and probabilities of
an attention; weights, biases and states of recurrent layers), where a scale belongs to a token, a group or a row of the
batch, and for gradients. What got a scale and what did not, and why, goes to every open `fuse_pass.collect()`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from fuse_pass.numerics.formats import Granularity
from fuse_pass.numerics.spec import Site
from fuse_pass.quantization import batches as batches_of_data
from fuse_pass.quantization.batches import Batch
from fuse_pass.quantization.layers import QuantizedLayer
from fuse_pass.quantization.layers.base import whole_weight
from fuse_pass.quantization.observers import Observer, as_observer
from fuse_pass.report import Decline, Match, Reason, Report, publish

ModelT = TypeVar("ModelT", bound=nn.Module)
MakeObserver = Callable[[Granularity], Observer]

_ACTIVATIONS = ("input", "output", "state")
_PARAMETERS = ("weight", "bias")


def calibrate(
    model: ModelT,
    batches: Iterable[Batch],
    *,
    observer: str | MakeObserver | None = None,
    progress: bool | None = None,
) -> ModelT:
    """Sets the scales of a converted model from data; from then on forward uses them instead of those of each tensor.

    The model runs in eval mode without gradients and with dynamic scales; its train and eval flags come back as they
    were. Scales become buffers of the layers, `input_scale` and, for asymmetric integers, `input_zero_point`, which
    travel with `state_dict` and are cast by `to(dtype)` like all buffers. To calibrate again replaces them, as is
    needed after weights have been trained. Learned scales become parameters, once: those that exist are kept. Create
    the optimizer after calibration.

    Args:
        model: a converted model; changed in place.
        batches: inputs of the model: each a tensor, a tuple (or list) of positional or a dict of keyword arguments.
        observer: "minmax", "moving_average", "percentile", "mse" or "lsq"; a class of `fuse_pass.observers`, or a
            function that makes one of a `Granularity`. By default "minmax", and "lsq" for learned scales.
        progress: whether there is a bar on stderr, if tqdm is installed; by default in runs of more than two seconds
            on a terminal.

    Returns:
        `model`.

    Raises:
        ValueError: no quantised layer, no site that takes a scale, no batch, an unknown observer, NaN or infinity in
            an observed tensor, or a site whose scale is "static" or "learned" where it can only be dynamic.
        TypeError: `model` is no module, `batches` is a single batch, or a batch is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate: expected a torch.nn.Module, got {type(model).__name__}")
    batches_of_data.require_batches(batches, "calibrate")
    recorders = _recorders(model, observer)
    with _observing(model, recorders):
        if not _run(model, batches, progress):
            raise ValueError("calibrate: there was no batch; at least one is needed")
    report = Report()
    for recorder in recorders:
        recorder.observe_parameters()
        recorder.require_explicit_scales()
    for recorder in recorders:
        recorder.set_scales(report)
    publish(report)
    return model


def _recorders(model: nn.Module, observer: str | MakeObserver | None) -> list[_Recorder]:
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)]
    if not layers:
        raise ValueError("calibrate: the model has no quantised layer; convert it first, e.g. convert(model, 'int8')")
    static, learned = (as_observer(observer or default) for default in ("minmax", "lsq"))
    recorders = [_Recorder(name, layer, static, learned) for name, layer in layers]
    if not any(recorder.sites for recorder in recorders):
        specs = "; ".join(sorted({str(layer.spec) for _, layer in layers}))
        raise ValueError(
            f"calibrate: no site takes a scale in {specs}; integer formats do, and floating-point ones with "
            "Site(..., scale='static')"
        )
    return recorders


class _Recorder:
    """What is seen of one layer."""

    def __init__(self, name: str, layer: QuantizedLayer, static: MakeObserver, learned: MakeObserver) -> None:
        self.name = name
        self.layer = layer
        self.ran = False
        self.dynamic: dict[str, str] = {}
        self.sites: dict[str, Site] = {}
        for site_name in (*_ACTIVATIONS, *_PARAMETERS):
            site = getattr(layer.spec, site_name)
            if site is not None and site.takes_scale:
                self.sites[site_name] = site
        self._make = {"learned": learned}
        self._static = static
        self._observers: dict[str, Observer] = {}
        self._calls: Counter[str] = Counter()

    def begin(self, *_: Any) -> None:
        """The layer is called."""
        self.ran = True
        self._calls.clear()

    def watch(self, site_name: str, x: Tensor) -> None:
        """A tensor comes to a site, before it is quantised."""
        if site_name not in _ACTIVATIONS or site_name not in self.sites or site_name in self.dynamic:
            return
        self._calls[site_name] += 1
        obstacle = self._obstacle(site_name, x)
        if obstacle:
            self.dynamic[site_name] = obstacle
        else:
            self._observe(site_name, x)

    def _obstacle(self, site_name: str, x: Tensor) -> str:
        granularity = self.sites[site_name].granularity
        if granularity.kind in ("token", "group"):
            return f"a scale per {granularity.kind} belongs to one batch"
        if granularity.axis is not None and x.dim() > 1 and granularity.axis % x.dim() == 0:
            return "axis 0 is the batch"
        if self._calls[site_name] > 1 and (site_name != "input" or granularity.kind != "tensor"):
            return "one site serves several tensors"
        return ""

    def observe_parameters(self) -> None:
        for site_name in _PARAMETERS:
            if site_name not in self.sites:
                continue
            site, value = self.sites[site_name], getattr(self.layer, site_name, None)
            whole = whole_weight(self.layer, site) if site_name == "weight" else value
            names = [name for name, _ in self.layer.named_parameters() if site_name in name]
            if isinstance(whole, Tensor):
                self._observe(site_name, whole)
            elif isinstance(value, Tensor):
                self.dynamic[site_name] = "rows are looked up before they are quantised"
            elif names:
                self.dynamic[site_name] = f"one site serves several tensors: {', '.join(names)}"

    def _observe(self, site_name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        site = self.sites[site_name]
        if site_name not in self._observers:
            self._observers[site_name] = self._make.get(site.scale or "", self._static)(site.granularity)
        try:
            self._observers[site_name].observe(x)
        except ValueError as error:
            raise ValueError(f"calibrate: {site_name} of {self.name or 'the model'}: {error}") from error

    def require_explicit_scales(self) -> None:
        for site_name, why in self.dynamic.items():
            site = self.sites[site_name]
            if site.needs_scale:
                raise ValueError(
                    f"calibrate: {site_name} of {self.name or 'the model'} ({type(self.layer).__name__}) has "
                    f"scale={site.scale!r}, but {why}; leave out the scale of that Site, or choose 'dynamic'"
                )

    def set_scales(self, report: Report) -> None:
        for site_name, why in self.dynamic.items():
            report.declines.append(Decline("calibrate", Reason.DYNAMIC_SCALE, f"{site_name}: {why}", self.name, "", ""))
        if not self.ran and any(site_name in _ACTIVATIONS for site_name in self.sites):
            detail = "no batch reached the layer"
            report.declines.append(Decline("calibrate", Reason.DYNAMIC_SCALE, detail, self.name, "", ""))
        for site_name, observer in self._observers.items():
            site = self.sites[site_name]
            exists = getattr(self.layer, f"{site_name}_scale", None) is not None
            if site_name in self.dynamic or (site.scale == "learned" and exists):
                continue
            self.layer.set_scale(site_name, *observer.scale_and_zero_point(site.format))
            report.matches.append(Match("calibrate", f"{site_name} {site.format.name}", self.name, "", ""))


@contextlib.contextmanager
def _observing(model: nn.Module, recorders: list[_Recorder]) -> Iterator[None]:
    """Every layer of an evaluated model is watched."""
    hooks = []
    try:
        for recorder in recorders:
            hooks.append(recorder.layer.register_forward_pre_hook(recorder.begin, prepend=True))
            recorder.layer._watch = recorder.watch
        with batches_of_data.evaluating(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for recorder in recorders:
            recorder.layer.__dict__.pop("_watch", None)


def _run(model: nn.Module, batches: Iterable[Batch], progress: bool | None) -> int:
    count = 0
    for count, batch in enumerate(batches_of_data.shown(batches, "calibrate", progress), 1):
        batches_of_data.call(model, batch, count, "calibrate")
    return count
