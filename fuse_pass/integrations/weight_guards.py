"""Keeps a file of packed weights from passing for one of float weights.

A loader that does not know of us only warns where names are missing or left over, and takes int8 codes for numbers. It
raises where a tensor has another shape. So what is saved under the name of a float weight never has that weight's
shape: int8 codes are flat, and beside packed codes stands a `weight` of one element.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fuse_pass.quantization.layers.int8_linear import Int8Linear
from fuse_pass.quantization.layers.packed import PackedLayer

_GUARD = "weight"


def guarded_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model for a file."""
    state = dict(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        key = f"{name}.{_GUARD}" if name else _GUARD
        if isinstance(module, PackedLayer):
            state[key] = torch.zeros(1, dtype=torch.uint8)
        elif isinstance(module, Int8Linear) and module.is_quantized:
            state[key] = state[key].flatten()
    return state


def expect_guards(model: nn.Module) -> None:
    """Makes room for a guarded state dict."""
    for module in model.modules():
        if isinstance(module, PackedLayer):
            module.register_buffer(_GUARD, torch.zeros(1, dtype=torch.uint8, device=module.words.device))
        elif isinstance(module, Int8Linear) and module.is_quantized:
            module.weight = module.weight.flatten()


def drop_guards(model: nn.Module) -> None:
    """After it was loaded."""
    for module in model.modules():
        if isinstance(module, PackedLayer):
            delattr(module, _GUARD)
        elif isinstance(module, Int8Linear) and module.is_quantized:
            module.weight = module.weight.view(module.out_features, module.in_features)
