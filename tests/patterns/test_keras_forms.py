"""Layers as Keras 3 writes them on torch: `to` before every layer, reads that nobody uses, kernels stored [in, out]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuse_pass.patterns import spellings
from tests.patterns.truth import assert_fused_like_eager

dense_inputs = spellings.dense_act_dense.CORPUS.example_inputs
norm_inputs = spellings.dropout_norm.CORPUS.example_inputs


def converted(x: Tensor) -> Tensor:
    """`keras.ops.convert_to_tensor` of a tensor."""
    return x if x.is_meta else x.to("cpu")


def dense(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    x = torch.matmul(converted(x), converted(kernel))
    return torch.add(converted(x), converted(bias))


def layer_normalization(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    x, gamma, beta = (converted(value).to(torch.float32) for value in (x, gamma, beta))
    return F.layer_norm(x, (x.shape[-1],), gamma, beta, 0.001)


def test_dense_with_gelu_dense_dropout_layer_normalization() -> None:
    def function(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = F.gelu(converted(dense(x.to("cpu"), w1.t().contiguous(), b1)), approximate="none")
        y = F.dropout(dense(h, w2.t().contiguous(), b2), p=0.25, training=True, inplace=False)
        return layer_normalization(y, b2 * 2, b2)

    counts = {"dense_act_dense": 1, "dropout_norm": 1}
    found = assert_fused_like_eager(function, dense_inputs(), counts=counts)
    assert found.report.declines == []


def test_add_layer_normalization_whose_sum_is_read_again() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        z = torch.add(converted(x), converted(r))
        return layer_normalization(z, w, b), z

    assert_fused_like_eager(function, norm_inputs(), counts={"dropout_norm": 1})


def test_a_norm_in_another_type_than_its_input() -> None:
    """Not every `to` returns what it is given."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        z = torch.add(converted(x), converted(r))
        return layer_normalization(z, w, b).to(x.dtype), z

    inputs = {name: value.detach().bfloat16().requires_grad_() for name, value in norm_inputs().items()}
    found = assert_fused_like_eager(function, inputs, counts={"dropout_norm": 1})
    assert found.output[0].dtype is torch.bfloat16
