"""`y = LayerNorm(residual + Dropout(x))`: the seam between two blocks of a transformer as one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fuse_pass.ops.dropout_norm import LAYER_NORM, dropout_norm
from fuse_pass.ops.plain import are_plain, is_untouched
from fuse_pass.ops.seed import seed


class FusedDropoutLayerNorm(nn.Module):
    """Dropout, residual addition and LayerNorm in one pass over the data, with the mask recomputed in backward.

    In eval, and for p = 0, no random numbers are drawn; for p = 1 the dropped input is exactly 0. Statistics of half
    types are computed in float32. The state dict is that of the LayerNorm: `layer_norm.weight` and `layer_norm.bias`,
    `[*dim]`.

    Args:
        dim: size, or sizes, of the normalised last dimension(s).
        dropout: probability of an element to be zeroed.
        eps: added to the variance.
        elementwise_affine: whether the norm has a learnable weight (and bias).
        bias: whether it has a bias, if it has a weight.
        device: where the parameters are created.
        dtype: their dtype.

    Raises:
        ValueError: `dropout` is outside [0, 1] or NaN, or `eps` is negative or NaN.
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        dropout: float = 0.1,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability between 0 and 1, got {dropout!r}")
        if not eps >= 0:
            raise ValueError(f"eps: expected a number ≥ 0, got {eps!r}")
        shape = dim if isinstance(dim, int) else list(dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(shape, eps, elementwise_affine, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, return_sum: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`LayerNorm(residual + Dropout(x))` for x and residual `[..., *dim]`; with `return_sum` also the sum.

        Raises what `nn.LayerNorm` and `+` raise for wrong sizes, dtypes and devices.
        """
        norm = self.layer_norm
        if not self._can_fuse(x, residual):
            total = self.dropout(x) if residual is None else residual + self.dropout(x)
            return (norm(total), total) if return_sum else norm(total)
        p = self.dropout.p if self.dropout.training else 0.0
        y, total, _ = dropout_norm(
            x, residual, norm.weight, norm.bias, seed(device=x.device) if p > 0 else None, p, norm.eps,
            len(norm.normalized_shape), LAYER_NORM, None, True,
        )  # fmt: skip
        if not return_sum:
            return y  # type: ignore[no-any-return]
        return y, x if residual is None and p == 0 else total

    def _can_fuse(self, x: Tensor, residual: Tensor | None) -> bool:
        norm = self.layer_norm
        if not (is_untouched(self.dropout, nn.Dropout) and is_untouched(norm, nn.LayerNorm)):
            return False
        if self.dropout.inplace or not are_plain(x, residual, norm.weight, norm.bias):
            return False
        if residual is not None and residual.shape != x.shape:
            return False
        if tuple(x.shape[-len(norm.normalized_shape) :]) != tuple(norm.normalized_shape):
            return False
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        # A norm of half-precision data with float32 parameters: native on a CPU, and what autocast makes elsewhere.
        mixed = x.device.type == "cpu" or torch.is_autocast_enabled(x.device.type)
        allowed = (dtype, torch.float32) if mixed and dtype.itemsize == 2 else (dtype,)
        return all(tensor is None or tensor.dtype in allowed for tensor in (norm.weight, norm.bias))
