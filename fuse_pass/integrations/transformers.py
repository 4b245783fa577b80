"""Hugging Face transformers: converted and packed models are saved by `save_pretrained`, and come back as they were.

    import fuse_pass.integrations.transformers  # once per process, also where a model is only loaded

    packed = fuse_pass.pack(model, "int4_weight_only", exclude="lm_head")
    packed.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)  # the same bits

    AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=FusePassConfig("int4_weight_only"))

`FusePassConfig` is a quantisation config of transformers, registered with it as others are. In config.json it holds a
version and what every layer became (`fuse_pass.quantization.description`); the file of weights holds codes and scales.
Without this import transformers does not know the method: it says "Unknown quantization type, got fuse_pass", goes on
with a float model, and raises at the first packed weight (`weight_guards`). Of a model that only simulates formats, it
gives the float model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fuse_pass.integrations.transformers_api import (
    HfQuantizer,
    PreTrainedModel,
    register_quantizer,
    should_convert_module,
)
from fuse_pass.integrations.transformers_config import METHOD, FusePassConfig
from fuse_pass.integrations.weight_guards import drop_guards, expect_guards, guarded_state_dict
from fuse_pass.quantization import swapping
from fuse_pass.quantization.convert import convert
from fuse_pass.quantization.description import KINDS, finish_loading, rebuild
from fuse_pass.quantization.layers.int8_linear import Int8Linear
from fuse_pass.quantization.pack import unpack

__all__ = ["FusePassConfig", "FusePassQuantizer", "attach"]


@register_quantizer(METHOD)
class FusePassQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves: makes the layers before their numbers come, or of the numbers.

    A config with `layers` is of a model that was saved quantised: a skeleton is built that its state dict fits. One
    without is a wish, and granted after the float weights have been loaded. On a CPU those are no copy: safetensors
    maps the file (of 775 MiB in float32, packing to 4 bits took 165 MiB at its peak, 119 of them the packed model).
    """

    quantization_config: FusePassConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError where a float model would be spread over devices and packed afterwards."""
        if isinstance(device_map, dict) and len(set(device_map.values())) > 1 and not self._is_described:
            raise ValueError(
                f"FusePassConfig quantises on one device, got device_map={device_map}; save the quantised model first, "
                "and load that"
            )

    @property
    def _is_described(self) -> bool:
        return self.quantization_config.layers is not None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self._is_described:
            return
        rebuild(model, self.quantization_config.layers or [], _finder(model))
        expect_guards(model)
        _forget_broken_ties(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._is_described:
            drop_guards(model)
            finish_loading(model)
            _follow(model)  # of a model without the head, that may have been all
        else:
            self.quantization_config.apply_to(model, self._left_out(model))
            attach(model)

    def _left_out(self, model: Any) -> list[str]:
        """The layers that transformers' quantizers leave as they are."""
        patterns = self.get_modules_to_not_convert(model)
        return [name for name, _ in model.named_modules() if name and not should_convert_module(name, patterns)]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Before saving: layers may have been swapped or calibrated since.

        Raises:
            ValueError: a model without memory, but for what was offloaded.
        """
        if any(tensor.is_meta for tensor in model.state_dict().values()) and not hasattr(model, "hf_device_map"):
            raise ValueError(
                "save_pretrained: expected a model with numbers, got one on the meta device; load it first"
            )
        attach(model)
        return guarded_state_dict(model), {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if any(isinstance(module, Int8Linear) for module in model.modules()):
            raise ValueError("there is no way back from the int8 weights of convert(model, 'llm_int8')")
        return unpack(convert(model, None, inplace=True), inplace=True)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed layers, too: their inputs get gradients."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights are those of fake quantisation, which train as ever."""
        return {group["kind"] for group in self.quantization_config.layers or []} == {"quantized"}

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any) -> Any:
    """Makes `save_pretrained` of a transformers model write what `convert` and `pack` made of it; returns the model.

    They call this by themselves once this module has been imported. It is for models that were converted before, or of
    which only a part was given to them.

    Raises:
        TypeError: no model of transformers.
        ValueError: no layer of `convert` or `pack` inside.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"attach: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    config = FusePassConfig.of(model)
    model.config.quantization_config = config
    model.hf_quantizer = FusePassQuantizer(config, pre_quantized=True)
    model.quantization_method = METHOD
    _forget_broken_ties(model)
    return model


def _follow(model: nn.Module) -> None:
    """After layers were swapped: every transformers model inside, since each may be saved by itself.

    Inner ones first: they share the config of the outermost.
    """
    for module in reversed(list(model.modules())):
        if not isinstance(module, PreTrainedModel):
            continue
        if any(isinstance(part, KINDS) for part in module.modules()):
            attach(module)
        elif isinstance(getattr(module, "hf_quantizer", None), FusePassQuantizer):
            module.hf_quantizer.remove_quantization_config(module)


def _forget_broken_ties(model: Any) -> None:
    """A packed layer has codes of its own: its weight is tied to no other, here or in the model that is loaded."""
    ties = {
        target: source for target, source in model.all_tied_weights_keys.items() if _are_there(model, target, source)
    }
    if not ties and model.all_tied_weights_keys:
        model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = ties


def _are_there(model: nn.Module, *names: str) -> bool:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return all(name in parameters for name in names)


def _finder(model: Any) -> Callable[[str], str | None]:
    """A layer's name in a model with another head, or without one; None for a layer of a head that is not there."""
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}

    def found(name: str) -> str | None:
        return next((one for one in (name, name.removeprefix(prefix), prefix + name) if one in names), None)

    return found


swapping.LISTENERS.append(_follow)
