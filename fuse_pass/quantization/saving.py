"""A warning where a library saves a model without saying that its layers are quantised.

`save_pretrained` of transformers (and of what follows its example) writes a state dict and a config. A state dict of
ours in a float model is a fault that nothing reports: int8 codes are taken for weights, packed ones are left out. Who
saves is asked of the stack, once per layer and save: a state dict alone, as of `torch.save`, is nobody's fault.
"""

from __future__ import annotations

import inspect
import warnings
from types import FrameType

from torch import nn

_SAVES = "save_pretrained"


def warn_if_not_described(layer: nn.Module) -> None:
    """Warns if the state dict of a layer is taken by a `save_pretrained` whose config does not tell of it."""
    owner = _owner(inspect.currentframe())
    if owner is None or getattr(owner, "hf_quantizer", None) is not None or hasattr(owner, "peft_config"):
        return  # described, or only adapters beside the layer are saved
    warnings.warn(
        f"fuse_pass: save_pretrained of {type(owner).__name__} writes {type(layer).__name__} layers, and not that they "
        "are quantised: from_pretrained will take their numbers for those of a float model. With transformers, "
        "import fuse_pass.integrations.transformers, and call its attach(model) if the model was converted before that "
        "or in parts; elsewhere load the state dict into a model that was converted in the same way",
        UserWarning,
        stacklevel=2,
    )


def _owner(frame: FrameType | None) -> nn.Module | None:
    """The model whose `save_pretrained` is running."""
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == _SAVES else None
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None
