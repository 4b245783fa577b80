"""Linear with LLM.int8 products (2208.07339): float16 weights that train, or int8 weights for inference."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from fuse_pass.gemm.integers import QMAX
from fuse_pass.ops.llm_int8 import checked_threshold, llm_int8_linear, quantize_rows
from fuse_pass.quantization.saving import warn_if_not_described


class HasInt8Weights(nn.Module):
    """A layer of several Linear layers that makes their weights int8 itself; `convert` asks it to.

    A subclass of such a layer may compute something else, and is not asked.
    """

    def quantize_(self) -> Self:
        """Makes the weights int8, for inference."""
        raise NotImplementedError

    @classmethod
    def is_own_class_of(cls, module: nn.Module) -> bool:
        return cls in type(module).__bases__


class Int8Linear(nn.Linear):
    """Linear whose product is LLM.int8 (2208.07339 §3; the formula is in `fuse_pass.ops.llm_int8`).

    Maps `[..., in_features]` to `[..., out_features]` in the dtype of its input. The weight is a float16 Parameter that
    every forward quantises anew, so training and evaluation always see its present value. `quantize_()` turns it into
    an int8 buffer `weight [out_features, in_features]` and a float32 buffer `weight_scale [out_features]`: no gradient
    for the weight any more, still one for the input and the bias.

    A state dict of either kind can be loaded into a layer of either kind, also one that bitsandbytes saved (`SCB`).

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        threshold: input columns with any magnitude above it are computed in floating point; 0 switches that off.
        device: where the parameters are created.
        dtype: dtype of the bias; the weight is float16.
    """

    weight_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        threshold: float = 6.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight = nn.Parameter(self.weight.detach().half())
        self.register_buffer("weight_scale", None)
        self.threshold = checked_threshold(threshold)

    @classmethod
    def from_float(cls, linear: nn.Linear, threshold: float = 6.0) -> Self:
        """A layer with the weight of `linear` rounded to float16, and the same bias Parameter."""
        layer = cls(linear.in_features, linear.out_features, False, threshold, device="meta")
        layer.weight = nn.Parameter(linear.weight.detach().half(), linear.weight.requires_grad)
        layer.bias = linear.bias
        return layer.train(linear.training)

    @classmethod
    def quantized(cls, linear: nn.Linear, threshold: float = 6.0) -> Self:
        """A layer with the int8 weight of `linear`, quantised without a detour by float16, and the same bias."""
        layer = cls.from_float(linear, threshold)
        layer.weight = linear.weight
        return layer.quantize_()

    @classmethod
    def from_bitsandbytes(cls, linear: nn.Module) -> Self:
        """Copy of a `bitsandbytes.nn.Linear8bitLt`, quantised or not."""
        state: Any = getattr(linear, "state", None)
        if not isinstance(linear, nn.Linear) or not hasattr(state, "threshold"):
            raise TypeError(
                f"from_bitsandbytes: expected a bitsandbytes.nn.Linear8bitLt, got {type(linear).__qualname__}"
            )
        has_bias, device = linear.bias is not None, linear.weight.device
        layer = cls(linear.in_features, linear.out_features, has_bias, float(state.threshold), device=device)
        layer.load_state_dict(linear.state_dict())
        return layer.train(linear.training)

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is int8."""
        return self.weight_scale is not None

    @torch.no_grad()
    def quantize_(self) -> Self:
        """Makes the weight int8 with float32 row scales, for inference; nothing if it is already."""
        if self.is_quantized:
            return self
        if self._parameters.get("weight") is None:
            raise RuntimeError("quantize_: the weight is computed (parametrized, pruned); make it a Parameter first")
        steps, scale = quantize_rows(self.weight)
        del self.weight, self.weight_scale
        self.register_buffer("weight", steps)
        self.register_buffer("weight_scale", scale.float())
        return self

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """`[..., in_features] → [..., out_features]`; `activation` (by name) is applied to x first.

        Raises what `nn.Linear` raises for a wrong size, dtype or device.
        """
        return llm_int8_linear(
            x, self.weight, self.bias, scale=self.weight_scale, threshold=self.threshold, activation=activation
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """`.to()`, `.half()` and their like, except that the scales stay float32."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if scale is not None and self.weight_scale is not None and self.weight_scale.dtype is not torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        warn_if_not_described(self)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        weight_key, scale_key = f"{prefix}weight", f"{prefix}weight_scale"
        absmax, layout = state_dict.pop(f"{prefix}SCB", None), state_dict.pop(f"{prefix}weight_format", "row")
        if absmax is not None:
            state_dict[scale_key] = absmax.float() / QMAX
        weight = state_dict.get(weight_key)
        if isinstance(weight, Tensor):
            if layout not in ("row", 0):
                errors.append(f"{weight_key}: expected bitsandbytes' row-major layout, got weight_format {layout}")
            elif weight.dtype is not torch.int8 and self.is_quantized and weight.dim() == 2:
                state_dict[weight_key], state_dict[scale_key] = quantize_rows(weight.detach())
            elif weight.dtype is torch.int8 and scale_key not in state_dict:
                errors.append(f"{weight_key} is int8: expected its scales in {scale_key} (or {prefix}SCB), got none")
            elif weight.dtype is torch.int8:
                self.quantize_()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}, weight={str(self.weight.dtype)[6:]}"
