"""What we use of transformers, and what is said where it is missing."""

from __future__ import annotations

try:
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        "fuse_pass.integrations.transformers needs transformers 5 or newer: pip install 'fuse_pass[transformers]'"
    ) from error

__all__ = [
    "HfQuantizer",
    "PreTrainedModel",
    "QuantizationConfigMixin",
    "register_quantization_config",
    "register_quantizer",
    "should_convert_module",
]
