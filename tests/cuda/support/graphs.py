"""Whether CUDA graphs can be made of what is generated, and how often a training step draws seeds."""

from __future__ import annotations

from typing import Any

from fuse_pass import FuseBackend
from fuse_pass.inductor import settings
from tests.cuda.support.capture import Sources, capture
from tests.cuda.support.cases import CASES, LARGE

BUDGETS = (1.0, 0.5, 0.0)


def check(name: str) -> dict[str, Any]:
    """What stands against CUDA graphs, for each graph; the draws of forward and backward for each memory budget."""
    # Otherwise Inductor would cut out what cannot be recorded, and say nothing.
    recorded = _captured(name, {"triton.cudagraphs": True, "graph_partition": False})
    draws = {}
    for budget in BUDGETS:
        with settings.memory_budget(budget):
            sources = _captured(name, {})
        draws[str(budget)] = [sum(map(_draws, part)) for part in (sources.forward, sources.backward)]
    return {"graphs": len(recorded.all), "obstacles": recorded.cudagraph_obstacles, "draws": draws}


def _captured(name: str, options: dict[str, Any]) -> Sources:
    case = CASES[name]
    backend = FuseBackend(strict=True, **case.options)
    return capture(
        lambda: case.build(LARGE), backend, train=case.train, autocast=case.autocast, options=options or None
    )


def _draws(source: str) -> int:
    return source.count("randint.low_out")
