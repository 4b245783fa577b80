"""Swaps layers inside a model, and keeps PyTorch from going past the ones that were put in."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fuse_pass.inductor import private

Swap = Callable[[nn.Module, str], nn.Module]
# What else is to know of a model whose layers were swapped: an integration that saves it.
LISTENERS: list[Callable[[nn.Module], None]] = []
# What PyTorch asks before it runs an encoder as one call on the bare weights of its layers.
_FAST_PATH_FLAGS = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


def swapped(model: nn.Module, swap: Swap) -> nn.Module:
    """The model with every module that `swap(module, name)` replaces replaced, once where it is used in several places.

    The parts of a replaced module belong to it and are not looked at. Hooks move to the new module, which also has
    those of its own.
    """
    return _swapped(model, "", swap, {})


def _swapped(module: nn.Module, name: str, swap: Swap, twins: dict[int, nn.Module]) -> nn.Module:
    if id(module) in twins:
        return twins[id(module)]
    new = swap(module, name)
    twins[id(module)] = new
    if new is not module:
        private.take_hooks(new, module)
        return new
    for child_name, child in list(private.children_of(module).items()):
        if child is not None:
            path = f"{name}.{child_name}" if name else child_name
            private.children_of(module)[child_name] = _swapped(child, path, swap, twins)
    return module


def finish(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    """Tells a model of the layers of these kinds that are inside now, or no longer: its fast paths, and who listens."""
    guard_fast_paths(model, kinds)
    for listener in LISTENERS:
        listener(model)
    return model


def guard_fast_paths(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Keeps PyTorch from running an encoder as one call where a layer of these kinds is inside; lets it elsewhere."""
    for module in model.modules():
        flag = _FAST_PATH_FLAGS.get(type(module))
        if flag is None:
            continue
        kept = f"_{flag}_before_convert"
        is_swapped = any(isinstance(part, kinds) for part in module.modules())
        if is_swapped and not hasattr(module, kept):
            setattr(module, kept, getattr(module, flag))
            setattr(module, flag, False)
        elif not is_swapped and hasattr(module, kept):
            setattr(module, flag, getattr(module, kept))
            delattr(module, kept)
