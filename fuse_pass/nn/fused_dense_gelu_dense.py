"""`y = gelu(x W1ᵀ + b1) W2ᵀ + b2`: the feed-forward block of a transformer as one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fuse_pass.nn.plain import are_plain, is_untouched, records_gradient
from fuse_pass.ops.dense_act_dense import dense_act_dense, dense_act_dense_inference

_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


class FusedDenseGELUDense(nn.Module):
    """Linear → GELU → Linear that saves only x and the pre-activation for backward.

    Maps `[..., dim]` to `[..., dim]` through a hidden layer of size `dim_out`; any rank from 1, empty batches included.
    The state dict is that of the two Linear layers: `dense1.weight [dim_out, dim]`, `dense1.bias [dim_out]`,
    `dense2.weight [dim, dim_out]`, `dense2.bias [dim]`.

    Args:
        dim: size of input and output.
        dim_out: size of the hidden layer.
        bias: whether both Linear layers have a bias.
        has_fp16_weights: LLM.int8 products on float16 weights (2208.07339); not available yet.
        threshold: |x| above which LLM.int8 keeps a column in floating point; stored, used with `has_fp16_weights`.
        approximate: `"none"` for the exact GELU (erf), `"tanh"` for its approximation.
        device: where the parameters are created.
        dtype: their dtype.

    Raises:
        ValueError: `approximate` is neither `"none"` nor `"tanh"`, or `threshold` is negative or NaN.
        NotImplementedError: `has_fp16_weights=True`.
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
        if has_fp16_weights:
            raise NotImplementedError(
                "FusedDenseGELUDense: has_fp16_weights=True (LLM.int8) is not available in this version; "
                "expected False, which runs the floating-point layer"
            )
        if approximate not in _ACTIVATIONS:
            raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
        if not threshold >= 0:
            raise ValueError(f"threshold: expected a number ≥ 0, got {threshold!r}")
        self.dim = dim
        self.dim_out = dim_out
        self.bias = bias
        self.has_fp16_weights = has_fp16_weights
        self.threshold = threshold
        self.dense1 = nn.Linear(dim, dim_out, bias=bias, device=device, dtype=dtype)
        self.act = nn.GELU(approximate=approximate)
        self.dense2 = nn.Linear(dim_out, dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim] → [..., dim]`; raises what `nn.Linear` raises for a wrong size, dtype or device."""
        first, second = self.dense1, self.dense2
        if not self._can_fuse(x):
            return self.dense2(self.act(self.dense1(x)))  # type: ignore[no-any-return]
        tensors = (x, first.weight, first.bias, second.weight, second.bias)
        op = dense_act_dense if records_gradient(*tensors) else dense_act_dense_inference
        result = op(*tensors, None, None, 0.0, _ACTIVATIONS[self.act.approximate], [])
        return result[0] if op is dense_act_dense else result  # type: ignore[no-any-return]

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
