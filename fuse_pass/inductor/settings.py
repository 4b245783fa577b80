"""What measurements and tests change about Inductor for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch._inductor.utils import fresh_cache


@contextlib.contextmanager
def fresh_caches() -> Iterator[None]:
    """Compiles into an empty folder that is deleted afterwards; code that was loaded meanwhile stays loaded."""
    with fresh_cache():
        yield


@contextlib.contextmanager
def constant_weights() -> Iterator[None]:
    """Lets Inductor fold and repack weights at the first call under `no_grad` ("freezing").

    It must surround that call: Dynamo decides while it traces, before the options of one compilation are read.
    """
    with inductor_config.patch(freezing=True):
        yield


@contextlib.contextmanager
def stock_random_numbers() -> Iterator[None]:
    """Asks for eager's random numbers."""
    with inductor_config.patch(fallback_random=True):
        yield


@contextlib.contextmanager
def memory_budget(share: float) -> Iterator[None]:
    """Has less kept for backward, and more computed again: 1 is what is usual, 0 keeps inputs alone."""
    with functorch_config.patch(activation_memory_budget=share):
        yield


@contextlib.contextmanager
def memory_budget_of_at_least(share: float) -> Iterator[None]:
    """The budget that is set, or this one where it is larger."""
    with memory_budget(max(share, functorch_config.activation_memory_budget)):
        yield


@contextlib.contextmanager
def no_collection_after_compiling() -> Iterator[None]:
    """For who compiles thousands of models: Dynamo collects garbage after each."""
    with dynamo_config.patch(run_gc_after_compile=False):
        yield
