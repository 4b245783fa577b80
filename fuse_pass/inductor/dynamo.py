"""What Dynamo has done so far in this process, what keeps it from compiling, and how a graph came to be a piece.

Asking does not load Dynamo: before it is loaded, it has done nothing, and only the environment can switch it off.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from torch.fx import GraphModule


@dataclass(frozen=True)
class Progress:
    """Attributes:
    graphs: how many graphs Dynamo has captured, for whichever backend.
    left_alone: how often it has met a function that `torch.compiler.disable` wraps.
    given_up: how often it has met its recompile limit.
    """

    graphs: int
    left_alone: int
    given_up: int

    def since(self, before: Progress) -> Progress:
        """What has happened since; zero where somebody has cleared Dynamo's counters in between."""
        steps = (max(0, now - then) for now, then in zip(vars(self).values(), vars(before).values(), strict=True))
        return Progress(*steps)


def is_loaded() -> bool:
    return "torch._dynamo" in sys.modules


def progress() -> Progress:
    if not is_loaded():
        return Progress(0, 0, 0)
    from torch._dynamo.utils import counters

    breaks = [*counters["graph_break"].items(), *counters["unimplemented"].items()]
    return Progress(
        counters["stats"]["unique_graphs"],
        sum(count for reason, count in breaks if "wrapped with `torch.compiler.disable`" in reason),
        sum(count for reason, count in breaks if "recompile limit" in reason.split("\n")[0]),
    )


def switched_off_by() -> str | None:
    """The setting that keeps Dynamo from compiling anything new, by the name under which a user can change it."""
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(name) == "1":
            return f"the environment variable {name}=1"
    if not is_loaded():
        return None
    from torch._dynamo import config, eval_frame

    if config.disable:
        return "torch._dynamo.config.disable"
    stance = eval_frame._stance.stance
    return f'torch.compiler.set_stance("{stance}")' if stance in ("force_eager", "eager_on_recompile") else None


def is_piece_for_ddp(module: GraphModule) -> bool:
    """Whether DistributedDataParallel's optimiser has cut the graph, so that gradients are sent while others run."""
    why = getattr(module, "compile_subgraph_reason", None)
    return "DDPOptimizer" in getattr(why, "reason", "")
