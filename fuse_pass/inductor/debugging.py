"""Private parts of PyTorch that only measurements and tests need."""

from __future__ import annotations

import torch
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "GROUPED_PRODUCT",
    "BatchNorm",
    "TorchDispatchMode",
    "aot_eager",
    "counters",
    "maybe_mark_dynamic",
    "tree_leaves",
    "tree_map",
]

GROUPED_PRODUCT = torch._grouped_mm
