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

import math
from typing import Any

import torch
from torch.fx import Node

from fuse_pass.graph.canonical import permutation
from fuse_pass.graph.convolution import CHANNELS, contiguous_strides, has_channels_last
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import is_permuted_contiguous, same_shape, same_size, value_of
from fuse_pass.graph.view import GraphView, Linear
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


def features_become_channels(view: GraphView, second: Linear, node: Node) -> bool:
    """Whether a node makes rows `[N, ..., C]` to the vectors `[N, C, ...]` that a 1×1 convolution reads, as they are.

    Depth-prediction heads do: Linear → GELU → `permute(0, 2, 1).reshape(N, C, H, W)` → convolution. Fused, 576 rows of
    1536 → 768 → 192 took as long as with torch.compile in training, in inference 1 / 1.16 of the time in float32 and
    7.6 instead of 7.2 ms in bfloat16 (Intel Xeon with AVX-512 and AMX, one thread, a busy machine).
    """
    op, read = view.op(node), value_of(second.input)
    before, after = None if op is None else value_of(op.arguments.get("input")), value_of(node)
    if op is None or before is None or after is None or read is None or second.features != CHANNELS:
        return False
    rank = before.dim()
    dims = permutation(op, rank) if op.kind in ("permute", "transpose") and rank > 2 else None
    return dims == [0, rank - 1, *range(1, rank - 1)] and same_shape(read.shape[:2], after.shape[:2])


def cost_of_mixing(anchor: Node, x: torch.Tensor | None, y: torch.Tensor | None) -> Problem | None:
    """Why a Linear before a 1×1 convolution is left alone: its rows are few, or y would have to be copied."""
    if x is None or y is None or not all(isinstance(size, int) for size in (*x.shape, *y.shape)):
        return Problem(Reason.LAYOUT, f"the sizes of {anchor.name} are known at run time only", anchor)
    rows = math.prod(x.shape[:-1])
    if rows < _MIN_ROWS:
        return Problem(Reason.COST, f"{rows} rows are too few to gain from another layout", anchor)
    if not y.requires_grad and y.dtype in (torch.bfloat16, torch.float16):
        return Problem(Reason.COST, f"inference in {y.dtype}, in which the convolution is as fast", anchor)
    copies = not has_channels_last(y)
    if not is_permuted_contiguous(y) or (copies and not (y.device.type == "cpu" and y.dtype is torch.float32)):
        return Problem(Reason.COST, f"{anchor.name} has strides {tuple(y.stride())} that take another copy", anchor)
    return None


def rows_to_channels(editor: Editor, y: Node, moved: Node, anchor: Node) -> Node:
    """What `features_become_channels` did to the hidden rows, done to the rows of the result."""
    before, result = value_of(moved.args[0]), value_of(anchor)
    assert before is not None
    assert result is not None
    y = editor.call("reshape", y, (*before.shape[:-1], result.shape[CHANNELS]))
    y = editor.call("reshape", editor.call("movedim", y, -1, CHANNELS), tuple(result.shape))
    return editor.laid_out_as(anchor, y)


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
