"""A random program from a seed: patterns or near misses among distractors, in a random setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from random import Random

from fuse_pass.testing.builder import Builder
from fuse_pass.testing.distractors import distract
from fuse_pass.testing.near_misses import NEAR_MISSES
from fuse_pass.testing.observe import UNUSUAL_ROWS
from fuse_pass.testing.plants import block, dense_act_dense, dropout_norm, spelled
from fuse_pass.testing.program import Program, Settings
from fuse_pass.testing.sources import ROWS
from fuse_pass.testing.surroundings import SURROUNDINGS

_NEAR_MISSES = (*NEAR_MISSES, *SURROUNDINGS)
# Means of so many equal numbers are rounded, and the error of what is computed from them.
_WIDE = ((1000,), (480, 480))
_PLANTS = (spelled, spelled, dense_act_dense, dropout_norm, block)


def generate(
    seed: int, *, near_misses: bool = False, plants: Sequence[Callable[[Builder], object]] | None = None
) -> Program:
    """The program of a seed; the same for ever, as long as the patterns have the same spellings.

    Args:
        seed: decides everything.
        near_misses: plant what only looks like a pattern.
        plants: what to plant, instead of the above.
    """
    random = Random(seed)
    widths = random.choices(((8,), (24,), (24, 24), (8, 24), *_WIDE), (4, 4, 4, 4, 1, 1))[0]
    b = Builder(random, [(*ROWS, width) for width in widths], distract)
    b.distract(0.5)
    for _ in range(random.choice((1, 1, 2))):
        random.choice(plants or (_NEAR_MISSES if near_misses else _PLANTS))(b)
        b.distract(0.4)
    if near_misses and random.random() < 0.3:
        random.choice(_PLANTS)(b)
    dynamic = random.random() < 0.15
    batch = ROWS[0] if dynamic or random.random() < 0.9 else random.choice((0, 1))
    settings = Settings(
        seed=seed,
        dtype=random.choices(("float32", "bfloat16", "float64"), (15, 3, 2))[0],
        training=random.random() < 0.6,
        grad=random.random() < 0.8,
        dynamic=dynamic,
        autocast=random.random() < 0.07,
        special=random.random() < 0.12 and batch > 0,
        fallback_random=b.fallback_random,
        rows=random.choice(tuple(UNUSUAL_ROWS)) if random.random() < (0.6 if widths in _WIDE else 0.15) else "",
        budget=random.choices((1.0, 0.7, 0.5, 0.2, 0.0), (6, 1, 1, 1, 1))[0],
    )
    if settings.dtype == "float64" and settings.rows == "huge and constant":
        # Eager's own mean of such a row is off by its last bits, beside which all else is small: it is no reference.
        settings = dataclasses.replace(settings, rows="huge")
    return b.program(settings, batch)
