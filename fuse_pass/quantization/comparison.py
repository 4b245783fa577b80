"""`fuse_pass.compare`: how far a converted or packed model is from the one that it was made of, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from fuse_pass.inductor import private
from fuse_pass.quantization import batches as batches_of_data
from fuse_pass.quantization.batches import Batch


@dataclass
class Difference:
    """Of two tensors, or of all pairs of one place.

    Attributes:
        signal: sum of the squares of the first.
        noise: sum of the squares of their differences.
        largest: the largest difference.
    """

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio in decibels: 10 log10(signal / noise); infinity where nothing differs."""
        if self.noise == 0:
            return math.inf
        if math.isnan(self.noise) or math.isnan(self.signal):
            return math.nan
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    def add(self, expected: Tensor, found: Tensor) -> None:
        wide = expected.detach().double()
        error = found.detach().double() - wide
        self.signal += float(wide.square().sum())
        self.noise += float(error.square().sum())
        largest = float(error.abs().max()) if error.numel() else 0.0
        self.largest = largest if math.isnan(largest) else max(self.largest, largest)


@dataclass
class LayerComparison:
    """One layer of both models.

    Attributes:
        name: as in `named_modules()`.
        kind: the types of both.
        alone: what the layer itself does to the inputs that it gets in the first model.
        so_far: what it gives in the second model, whose layers before it differ too.
    """

    name: str
    kind: str
    alone: Difference = field(default_factory=Difference)
    so_far: Difference = field(default_factory=Difference)


@dataclass
class Comparison:
    """What `compare` found; `str()` of it is a table, the worst layer first.

    Attributes:
        layers: those that differ in type, in the order of the model.
        outputs: all floating-point results of the models.
        top1: share of rows of the first result in which the largest element is at the same place; None where it has
            one column, or no result is floating point.
        batches: how many were run.
    """

    layers: list[LayerComparison]
    outputs: Difference = field(default_factory=Difference)
    batches: int = 0
    _same: int = field(default=0, repr=False)
    _rows: int = field(default=0, repr=False)

    @property
    def top1(self) -> float | None:
        return self._same / self._rows if self._rows else None

    def worst(self) -> list[LayerComparison]:
        """The layers by what each does by itself, worst first."""
        return sorted(self.layers, key=lambda layer: (not math.isnan(layer.alone.snr), layer.alone.snr))

    def __str__(self) -> str:
        rows = [
            [layer.name, layer.kind, layer.alone.snr, layer.alone.largest, layer.so_far.snr] for layer in self.worst()
        ]
        headers = ["layer", "types", "alone (dB)", "largest error", "so far (dB)"]
        table = tabulate(rows, headers=headers, floatfmt=("", "", ".1f", ".2e", ".1f"))
        top1 = "" if self.top1 is None else f", the same largest element in {self.top1:.1%} of rows"
        whole = f"Results: {self.outputs.snr:.1f} dB, largest error {self.outputs.largest:.2e}{top1}; "
        return f"{whole}{self.batches} batches.\n\n{table}" if rows else f"{whole}{self.batches} batches."


def compare(
    model: nn.Module, other: nn.Module, batches: Iterable[Batch], *, progress: bool | None = None
) -> Comparison:
    """Runs batches through a model and what `convert` or `pack` made of it, and says how much each layer differs.

    Both run eagerly, in eval mode and without gradients; they are left as they were. Sums are float64. What the layers
    of the first model give for one batch is kept until the second has run.

    Args:
        model: the first model, whose results are taken for right; compiled ones run eagerly too.
        other: a model with modules of the same names; layers are compared where the types differ.
        batches: inputs of both: each a tensor, a tuple (or list) of positional or a dict of keyword arguments.
        progress: whether there is a bar on stderr, if tqdm is installed; by default in runs of more than two seconds
            on a terminal.

    Returns:
        Signal-to-noise ratios in decibels per layer and of the results, largest errors, and the share of rows whose
        largest element is at the same place.

    Raises:
        TypeError: one of the two is no module, `batches` is a single batch, or a batch is none.
        ValueError: there is no batch, or the results of the models are no tensors of the same shapes.
    """
    for given in (model, other):
        if not isinstance(given, nn.Module):
            raise TypeError(f"compare: expected two torch.nn.Modules, got a {type(given).__name__}")
    batches_of_data.require_batches(batches, "compare")
    model, other = private.uncompiled(model), private.uncompiled(other)  # as they run here; names without a prefix
    pairs = _differing(model, other)
    comparison = Comparison([pair.layer for pair in pairs])
    hooks: list[Any] = []
    try:
        for pair in pairs:
            hooks.append(pair.first.register_forward_hook(pair.after_first, with_kwargs=True))
            hooks.append(pair.second.register_forward_hook(pair.after_second))
        with batches_of_data.evaluating(model, other):
            for count, batch in enumerate(batches_of_data.shown(batches, "compare", progress), 1):
                expected = batches_of_data.call(model, batch, count, "compare")
                _add_results(comparison, expected, batches_of_data.call(other, batch, count, "compare"))
                comparison.batches = count
                for pair in pairs:
                    pair.expected.clear()
    finally:
        for hook in hooks:
            hook.remove()
    if not comparison.batches:
        raise ValueError("compare: there was no batch; at least one is needed")
    return comparison


@dataclass
class _Pair:
    """A layer of both models, with their hooks.

    Attributes:
        layer: what is found.
        first: the first model's.
        second: the second model's.
        expected: what the first gave for this batch, call by call.
        is_alone: whether the second is being called from here.
    """

    layer: LayerComparison
    first: nn.Module
    second: nn.Module
    expected: list[Tensor] = field(default_factory=list)
    is_alone: bool = False

    def after_first(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """The second model's layer is called with the same inputs."""
        expected = _floats(result)
        self.is_alone = True
        try:
            found = _floats(self.second(*args, **kwargs))
        finally:
            self.is_alone = False
        for a, b in zip(expected, found, strict=True):
            self.layer.alone.add(a, b)
        self.expected += [tensor.clone() for tensor in expected]  # what follows may write into the results

    def after_second(self, module: nn.Module, args: Any, result: Any) -> None:
        if self.is_alone:
            return
        for found in _floats(result):
            if self.expected and self.expected[0].shape == found.shape:
                self.layer.so_far.add(self.expected.pop(0), found)


def _differing(model: nn.Module, other: nn.Module) -> list[_Pair]:
    """The outermost modules whose types differ."""
    others, found = dict(other.named_modules()), list[_Pair]()
    for name, first in model.named_modules():
        second = others.get(name)
        inside = any(name.startswith(f"{pair.layer.name}.") or not pair.layer.name for pair in found)
        if second is not None and not inside and type(first) is not type(second):
            kind = f"{type(first).__name__} → {type(second).__name__}"
            found.append(_Pair(LayerComparison(name, kind), first, second))
    return found


def _floats(result: Any) -> list[Tensor]:
    return [leaf for leaf in private.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _add_results(comparison: Comparison, expected: Any, found: Any) -> None:
    first, second = _floats(expected), _floats(found)
    shapes, others = ([list(tensor.shape) for tensor in tensors] for tensors in (first, second))
    if shapes != others or not first:
        raise ValueError(f"compare: expected results with the same floating-point tensors, got {shapes} and {others}")
    for a, b in zip(first, second, strict=True):
        comparison.outputs.add(a, b)
    logits, others_logits = first[0], second[0]
    if logits.dim() and logits.shape[-1] > 1:
        same = logits.argmax(-1) == others_logits.argmax(-1)
        comparison._same += int(same.sum())
        comparison._rows += same.numel()
