"""Over PyTorch's own samples of its layers: with a format that holds every value, a quantised layer is the layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fuse_pass.nn.quantized import LAYER_FOR
from fuse_pass.spec import QuantSpec

common_modules = pytest.importorskip("torch.testing._internal.common_modules")

EXACT = QuantSpec.uniform("fp32")
# Sums in another order.
REORDERED = (nn.RNN, nn.LSTM, nn.GRU, nn.MultiheadAttention)
INFOS = [info for info in common_modules.module_db if info.module_cls in LAYER_FOR]


def run(layer: nn.Module, given: Any) -> list[Any]:
    """Outputs, all gradients and all buffers, under one seed."""

    def own(value: Any) -> Any:
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    args, kwargs = tree_map(own, (given.args, given.kwargs))
    torch.manual_seed(3)
    outputs = [y for y in tree_leaves(layer(*tree_map(copied, args), **kwargs)) if isinstance(y, Tensor)]
    floating = [y for y in outputs if y.requires_grad]
    torch.autograd.backward(floating, [torch.linspace(-1, 1, y.numel()).view(y.shape) for y in floating])
    leaves = [x for x in (*tree_leaves((args, kwargs)), *layer.parameters()) if isinstance(x, Tensor)]
    return [*(y.detach() for y in outputs), *(x.grad for x in leaves), *layer.buffers()]


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_equals_the_layer_on_pytorch_s_samples(info: Any, training: bool) -> None:
    kind, compared = info.module_cls, 0
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=training
    ):
        if sample.forward_input is None:
            continue
        arguments = sample.constructor_input
        torch.manual_seed(0)
        layer = kind(*arguments.args, **arguments.kwargs).train(training)
        quantized = LAYER_FOR[kind].from_float(copy.deepcopy(layer), EXACT)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if kind in REORDERED else {"rtol": 0.0, "atol": 0.0}
        ours, theirs = run(quantized, sample.forward_input), run(layer, sample.forward_input)
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
        compared += 1
    assert compared
