"""What `torch.export` captures before it lowers it: a graph like those that Dynamo hands to backends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.export._trace import _export_to_torch_ir
from torch.fx import GraphModule

from fuse_pass.inductor.private import buffers_of, children_of, parameters_of

__all__ = ["captured", "with_state_of"]


def captured(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> GraphModule:
    """The whole model as one graph of what it calls, with its parameters under their own names.

    Raises what `torch.export.export` raises of a model, or of shapes, that it does not take.
    """
    return _export_to_torch_ir(model, args, dict(kwargs), dynamic_shapes, _log_export_usage=False)


def with_state_of(model: nn.Module, graph_module: GraphModule) -> GraphModule:
    """A rewritten graph with a signature that `torch.export` can read, and with all of the model's state."""
    made = GraphModule(graph_module, graph_module.graph)
    for path, module in model.named_modules(remove_duplicate=False):
        if parameters_of(module) or buffers_of(module):
            home = _submodule(made, path)
            # Those that nothing reads too, and those of another name: a state dict is that of the model.
            parameters_of(home).update(parameters_of(module))
            buffers_of(home).update(buffers_of(module))
            home._non_persistent_buffers_set |= module._non_persistent_buffers_set
    return made


def _submodule(module: nn.Module, path: str) -> nn.Module:
    """The one at a path, which is made where there is none."""
    for name in path.split(".") if path else ():
        if name not in children_of(module):
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module
