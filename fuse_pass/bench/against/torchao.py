"""torchao: layers swapped by `quantize_`, then `torch.compile`, without which it is slower."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fuse_pass.bench.against.contender import (
    GROUP,
    INT4_WEIGHT_ONLY,
    INT8,
    INT8_WEIGHT_ONLY,
    Built,
    Contender,
    Task,
    under_no_grad,
)
from fuse_pass.bench.contenders import own_function


def _int8(task: Task) -> Built:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _quantized(task, Int8DynamicActivationInt8WeightConfig())


def _int8_weight_only(task: Task) -> Built:
    from torchao.quantization import Int8WeightOnlyConfig

    return _quantized(task, Int8WeightOnlyConfig())


def _int4_weight_only(task: Task) -> Built:
    """The only packing of int4 that has a kernel for CPUs in torchao 0.18."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return _quantized(task, PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False))


def _quantized(task: Task, config: Any) -> Built:
    from torchao.quantization import quantize_

    model = copy.deepcopy(task.example.model)
    quantize_(model, config)
    return Built(under_no_grad(torch.compile(own_function(model)), task.example))


TORCHAO = Contender(
    "torchao",
    ("torchao",),
    "fuse_pass[contenders]",
    {INT8: _int8, INT8_WEIGHT_ONLY: _int8_weight_only, INT4_WEIGHT_ONLY: _int4_weight_only},
)
