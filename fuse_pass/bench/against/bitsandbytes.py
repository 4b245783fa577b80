"""bitsandbytes: its 8-bit layers, whose inputs are int8 too, and its 4-bit ones in place of the Linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from fuse_pass.bench.against.contender import (
    GROUP,
    INT4_WEIGHT_ONLY,
    INT8,
    Built,
    Contender,
    Task,
    under_no_grad,
)


def _int8(task: Task) -> Built:
    from bitsandbytes.nn import Linear8bitLt

    def like(layer: nn.Linear) -> Any:
        return Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)

    return _swapped(task, like)


def _int4_weight_only(task: Task) -> Built:
    """The better of its two 4-bit formats, nf4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    def like(layer: nn.Linear) -> Any:
        swapped = Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=task.dtype, quant_type="nf4"
        )
        swapped.weight = Params4bit(
            layer.weight.data, requires_grad=False, blocksize=GROUP, quant_type="nf4", module=swapped
        )
        return swapped

    return _swapped(task, like)


def _swapped(task: Task, like: Callable[[nn.Linear], Any]) -> Built:
    model = copy.deepcopy(task.example.model)
    layers = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear]
    for name, layer in layers:
        swapped = like(layer)
        swapped.load_state_dict(layer.state_dict())
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, swapped.to("cpu"))  # which quantises
    return Built(under_no_grad(model.eval(), task.example))


BITSANDBYTES = Contender(
    "bitsandbytes",
    ("bitsandbytes",),
    "fuse_pass[contenders]",
    {INT8: _int8, INT4_WEIGHT_ONLY: _int4_weight_only},
)
