"""`y = gelu(x W1ᵀ + b1) W2ᵀ + b2`: the feed-forward block of a transformer as one layer, floating point or LLM.int8."""

from __future__ import annotations

import functools
from typing import Self

import torch
from torch import Tensor, nn

from fuse_pass.ops.dense_act_dense import dense_act_dense, dense_act_dense_inference
from fuse_pass.ops.llm_int8 import checked_threshold
from fuse_pass.ops.plain import are_plain, is_untouched, records_gradient
from fuse_pass.quantization.layers.int8_linear import HasInt8Weights, Int8Linear

_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


class FusedDenseGELUDense(HasInt8Weights):
    """Linear → GELU → Linear that saves only x and the pre-activation for backward.

    Maps `[..., dim]` to `[..., dim]` through a hidden layer of size `dim_out`; any rank from 1, empty batches included.
    The state dict is that of the two Linear layers: `dense1.weight [dim_out, dim]`, `dense1.bias [dim_out]`,
    `dense2.weight [dim, dim_out]`, `dense2.bias [dim]`; after `quantize_()` also the two `weight_scale`.

    Args:
        dim: size of input and output.
        dim_out: size of the hidden layer.
        bias: whether both Linear layers have a bias.
        has_fp16_weights: whether both products are LLM.int8 (2208.07339) on trainable float16 weights (`Int8Linear`).
        threshold: |x| above which LLM.int8 keeps a column in floating point; 0 keeps none.
        approximate: `"none"` for the exact GELU (erf), `"tanh"` for its approximation.
        device: where the parameters are created.
        dtype: their dtype; with `has_fp16_weights` that of the biases.

    Raises:
        ValueError: `approximate` is neither `"none"` nor `"tanh"`, or `threshold` is negative or NaN.
        TypeError: `threshold` is no number.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        bias: bool = True,
        has_fp16_weights: bool = False,
        threshold: float = 6.0,
        *,
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if approximate not in _ACTIVATIONS:
            raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
        self.dim = dim
        self.dim_out = dim_out
        self.bias = bias
        self.has_fp16_weights = has_fp16_weights
        self._threshold = checked_threshold(threshold)
        linear = functools.partial(Int8Linear, threshold=threshold) if has_fp16_weights else nn.Linear
        self.dense1 = linear(dim, dim_out, bias=bias, device=device, dtype=dtype)
        self.act = nn.GELU(approximate=approximate)
        self.dense2 = linear(dim_out, dim, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_bitsandbytes(cls, module: nn.Module) -> Self:
        """Copy of a module whose `dense1` and `dense2` are `bitsandbytes.nn.Linear8bitLt`, with `act` between them."""
        first, second = (Int8Linear.from_bitsandbytes(getattr(module, name)) for name in ("dense1", "dense2"))
        approximate = getattr(getattr(module, "act", None), "approximate", "none")
        layer = cls(
            first.in_features, first.out_features, first.bias is not None, True, first.threshold,
            approximate=approximate, device="meta",
        )  # fmt: skip
        layer.dense1, layer.dense2 = first, second
        return layer.train(module.training)

    @property
    def threshold(self) -> float:
        """|x| above which LLM.int8 keeps a column in floating point."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._threshold = checked_threshold(value)
        for part in (self.dense1, self.dense2):
            if isinstance(part, Int8Linear):
                part.threshold = value

    def quantize_(self) -> Self:
        """Makes both weights int8 with float32 row scales (LLM.int8), for inference; nothing if they are already.

        A float layer is quantised from its own weights, without a detour by float16.
        """
        parts = {"dense1": self.dense1, "dense2": self.dense2}
        for name, part in parts.items():
            if not isinstance(part, Int8Linear) and not is_untouched(part, nn.Linear):
                raise TypeError(f"quantize_: expected {name} to be an nn.Linear without hooks, got {part}")
        for name, part in parts.items():
            if not isinstance(part, Int8Linear):
                part = Int8Linear.quantized(part, self.threshold)
                setattr(self, name, part)
            part.quantize_()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim] → [..., dim]`; raises what `nn.Linear` raises for a wrong size, dtype or device."""
        first, second = self.dense1, self.dense2
        if self._can_fuse(x):
            tensors = (x, first.weight, first.bias, second.weight, second.bias)
            op = dense_act_dense if records_gradient(*tensors) else dense_act_dense_inference
            result = op(*tensors, None, None, 0.0, _ACTIVATIONS[self.act.approximate], [])
            return result[0] if op is dense_act_dense else result  # type: ignore[no-any-return]
        hidden = first(x)
        if is_untouched(self.act, nn.GELU) and is_untouched(second, Int8Linear):
            # The second product recomputes the activation in backward, so that nothing but x and `hidden` is saved.
            return second(hidden, _ACTIVATIONS[self.act.approximate])  # type: ignore[no-any-return]
        return second(self.act(hidden))  # type: ignore[no-any-return]

    def _can_fuse(self, x: Tensor) -> bool:
        parts = ((self.dense1, nn.Linear), (self.act, nn.GELU), (self.dense2, nn.Linear))
        if not all(is_untouched(part, expected) for part, expected in parts):
            return False
        tensors = (x, self.dense1.weight, self.dense1.bias, self.dense2.weight, self.dense2.bias)
        if not are_plain(*tensors):
            return False
        autocast = torch.is_autocast_enabled(x.device.type)
        same_dtype = all(tensor is None or tensor.dtype is x.dtype for tensor in tensors)
        sizes_fit = self.dense2.weight.shape[1] == self.dense1.weight.shape[0]
        return (autocast or same_dtype) and x.dim() > 0 and x.shape[-1] == self.dense1.weight.shape[1] and sizes_fit

    def extra_repr(self) -> str:
        return f"dim={self.dim}, dim_out={self.dim_out}, bias={self.bias}"
