"""1×1 convolutions in the fused op, which wants the features last: what that costs, and how it is written.

Measured against torch.compile on one AMD Zen 5 core (conv → GELU → conv, training / inference):

| data | float32 | bfloat16 |
|---|---|---|
| `[8, 384, 256]`, a transposed `[B, L, C]` | 1.9× / 2.2× | 1.3× / 1.4× |
| `[8, 192, 14, 14]` channels_last | 1.9× / 2.1× | 1.1× / 1.0× |
| `[8, 192, 14, 14]` contiguous, both ends copied | 1.6× / 1.9× | 1.1× / 0.65× |
| `[8, 512, 1, 1]`, squeeze and excite | 1.1× / 0.93× | |

So the copies pay in float32 on a CPU alone, and a handful of rows never does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fuse_pass.graph.convolution import CHANNELS, contiguous_strides, has_channels_last
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import same_shape, same_size
from fuse_pass.report import Reason

_MIN_ROWS = 64


def cost_of_layout(anchor: Node, x: torch.Tensor | None, y: torch.Tensor | None) -> Problem | None:
    """Why moving the channels of x to the end, and those of y back, would cost more than the fusion gives."""
    if x is None or y is None:
        return Problem(Reason.LAYOUT, f"the shape of {anchor.name} is unknown", anchor)
    problem = cost_of_few_rows(anchor, x)
    if problem is not None:
        return problem
    if not _can_be_restored(y):
        return Problem(Reason.COST, f"{anchor.name} has strides {tuple(y.stride())} that take another copy", anchor)
    copies = not (has_channels_last(x) and has_channels_last(y))
    transposed = has_channels_last(x) and x.dim() == 3
    if copies and not transposed and not (y.device.type == "cpu" and y.dtype is torch.float32):
        detail = f"the channels of {tuple(x.shape)} would have to be copied to the end, and back"
        return Problem(Reason.COST, detail, anchor)
    return None


def cost_of_few_rows(anchor: Node, x: torch.Tensor | None) -> Problem | None:
    rows = None if x is None else _rows(x)
    if isinstance(rows, int) and rows < _MIN_ROWS:
        return Problem(Reason.COST, f"{rows} rows are too few to gain from another layout", anchor)
    return None


def _rows(x: torch.Tensor) -> Any:
    rows: Any = x.shape[0]
    for size in x.shape[2:]:
        rows = rows * size
    return rows


def _can_be_restored(y: torch.Tensor) -> bool:
    """Whether `channels_back` yields exactly the strides of y."""
    if has_channels_last(y):
        return True
    already_contiguous = same_size(y.shape[CHANNELS], 1) or same_size(_rows(y), y.shape[0])
    return not already_contiguous and same_shape(y.stride(), contiguous_strides(y.shape))


def channels_to_the_end(editor: Editor, x: Node | None) -> Node:
    return editor.call("movedim", x, CHANNELS, -1)


def channels_back(editor: Editor, y: Node, like: torch.Tensor) -> Node:
    y = editor.call("movedim", y, -1, CHANNELS)
    return y if has_channels_last(like) else editor.call("contiguous", y)
