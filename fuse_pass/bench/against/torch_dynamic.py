"""PyTorch's own dynamic quantisation of Linear layers, whose inputs have one scale for all rows."""

from __future__ import annotations

import torch
from torch import nn

from fuse_pass.bench.against.contender import INT8, Built, Contender, Task, under_no_grad


def _int8(task: Task) -> Built:
    model = torch.ao.quantization.quantize_dynamic(task.example.model, {nn.Linear}, dtype=torch.qint8)
    return Built(under_no_grad(model, task.example))


TORCH_DYNAMIC = Contender("torch_dynamic", (), "torch", {INT8: _int8})
