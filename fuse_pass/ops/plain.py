"""When a layer may hand its tensors to a fused op; otherwise it runs its `torch.nn` parts one by one.

The parts are real `torch.nn` modules, so users may hook, prune, parametrise or replace them. Whatever a fused op cannot
honour, wrong input included, goes to the parts: they do it right, or raise what `torch.nn` raises.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fuse_pass.inductor import private


def is_untouched(part: nn.Module, expected: type[nn.Module]) -> bool:
    """Whether a part is exactly the `torch.nn` module it was built as, without a hook that a fused op would skip."""
    return type(part) is expected and "forward" not in vars(part) and not private.has_hooks(part)


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary strided floating-point tensors (or Parameters) on one device, outside torch.func."""
    present = [tensor for tensor in tensors if tensor is not None]
    return all(
        (type(tensor) in (Tensor, nn.Parameter) or torch.compiler.is_exporting())  # torch.export traces with fakes
        and tensor.is_floating_point()
        and tensor.layout is torch.strided
        and tensor.device == present[0].device
        for tensor in present
    ) and not are_transformed(*present)


def are_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func.vmap, grad or their like wrap any of them, in eager mode."""
    if torch.compiler.is_compiling():
        return False
    return any(tensor is not None and private.is_transformed(tensor) for tensor in tensors)


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
