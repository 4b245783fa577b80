"""Models run on batches of a user's data: what a batch is, a bar, and modes that come back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]

_SECONDS_UNTIL_SHOWN = 2.0


def require_batches(batches: Any, what: str) -> None:
    """TypeError for a single batch in the place of several."""
    if isinstance(batches, (Tensor, Mapping, str)):
        raise TypeError(f"{what}: expected batches, got one {type(batches).__name__}; put it into a list")


def call(model: nn.Module, batch: Batch, count: int, what: str) -> Any:
    """The result for the `count`-th batch: a tensor, a tuple (or list) of positional or a dict of keyword arguments.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    raise TypeError(f"{what}: batch {count}: expected a tensor, tuple or dict of inputs, got {type(batch).__name__}")


def shown(batches: Iterable[Batch], what: str, progress: bool | None) -> Iterable[Batch]:
    """The batches, with a bar where one is wanted and tqdm is there."""
    if progress is False:
        return batches
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    # `disable=None` is tqdm's "not on a terminal"
    disable, delay = (False, 0.0) if progress else (None, _SECONDS_UNTIL_SHOWN)
    return tqdm(batches, desc=what, unit="batch", delay=delay, disable=disable, leave=False)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and no compiled code; train and eval flags come back as they were."""
    training = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
