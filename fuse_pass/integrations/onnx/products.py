"""Products in ONNX: MatMulInteger for integers, MatMulNBits (com.microsoft) for weights of few bits.

    MatMulInteger   int8 becomes uint8 with a zero point of 128: of the kernels of ONNX Runtime on processors without
                    VNNI, that for uint8 × int8 saturates its sums of two, and that for uint8 × uint8 does not
    MatMulNBits     y = Σ x (code − zero) · scale, a scale for each block of inputs, float32

Shapes: a and x `[rows, inner]`, codes and weight `[columns, inner]`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.onnx.ops
from torch import Tensor


def integer_product(a: Tensor, codes: Tensor, offset: int) -> Tensor:
    """`a @ (codes − offset).T`, int32, exact; a int8, codes uint8."""
    shifted = (a.to(torch.int32) + 128).to(torch.uint8)
    zeros = (torch.full((), zero, dtype=torch.uint8, device=a.device) for zero in (128, offset))
    shape = (a.shape[0], codes.shape[0])
    return torch.onnx.ops.symbolic("MatMulInteger", (shifted, codes.t(), *zeros), dtype=torch.int32, shape=shape)


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T`, int32, exact; both int8."""
    return integer_product(a, (b.to(torch.int32) + 128).to(torch.uint8), 128)


def block_product(x: Tensor, blob: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """`x @ ((codes − zero) · scale).T`, summed in float32.

    Args:
        x: float32.
        blob: codes of 8 bits, or two of 4 a byte, the first in its low half, uint8 `[columns, blocks, bytes]`.
        scale: float32 `[columns, blocks]`.
        zero: packed likewise, uint8 `[columns, ceil(blocks · bits / 8)]`; None for 2^(bits − 1).
        bits: of a code.
    """
    columns, inner, block_size = blob.shape[0], x.shape[-1], blob.shape[2] * (8 // bits)
    # By default ONNX Runtime rounds x to int8; level 1 is float32.
    attributes: dict[str, Any] = {"K": inner, "N": columns, "bits": bits, "block_size": block_size, "accuracy_level": 1}
    inputs = (x, blob, scale.flatten(), *(() if zero is None else (zero.flatten(),)))
    shape = (*x.shape[:-1], columns)
    return torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits", inputs, attributes, dtype=torch.float32, shape=shape, version=1
    )
