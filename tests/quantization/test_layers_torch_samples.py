"""Every quantised layer against PyTorch's own samples of its layer (ModuleInfo), in a format that holds every value."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db
from torch.utils._pytree import tree_leaves, tree_map

from fuse_pass.numerics.formats import FloatFormat
from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.quantization.layers import LAYER_FOR

EXACT = {
    torch.float32: QuantSpec.uniform("fp32"),
    torch.float64: QuantSpec.uniform(FloatFormat(11, 52)),
}
SUMS_IN_ANOTHER_ORDER = (nn.RNN, nn.LSTM, nn.GRU, nn.MultiheadAttention)
INFO = {info.module_cls: info for info in module_db if info.module_cls in LAYER_FOR}
WITHOUT_SAMPLES = {nn.Hardsigmoid, nn.AlphaDropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}

every_type = pytest.mark.parametrize("float_type", INFO, ids=lambda kind: kind.__name__)
train_and_eval = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def samples(info: ModuleInfo, dtype: torch.dtype, training: bool) -> list[ModuleInput]:
    """What PyTorch tests the layer with; the same numbers at every call."""
    torch.manual_seed(0)
    found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    return [sample for sample in found if sample.forward_input is not None]


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def run(layer: nn.Module, sample: ModuleInput) -> dict[str, Tensor | None]:
    """Outputs, all gradients and all buffers after one step."""
    torch.manual_seed(3)
    leaves = tree_map(_leaf, (sample.forward_input.args, sample.forward_input.kwargs))
    # Copies, because a layer that works in place may not write into a leaf.
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, leaves)
    outputs = list(tensors(layer(*args, **kwargs)))
    roots = [y for y in outputs if y.requires_grad]
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(roots, [torch.randn(y.shape, generator=generator).to(y.dtype) for y in roots])
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(tensors(leaves))}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def _leaf(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def assert_equals_torch(float_type: type[nn.Module], sample: ModuleInput, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    constructor = sample.constructor_input
    layer = float_type(*constructor.args, **constructor.kwargs).to(dtype).train(training)
    quantized = LAYER_FOR[float_type].from_float(copy.deepcopy(layer), EXACT[dtype])
    ours, theirs = run(quantized, sample), run(layer, sample)
    assert ours.keys() == theirs.keys()
    tolerance = {"rtol": 0.0, "atol": 0.0}
    if float_type in SUMS_IN_ANOTHER_ORDER:
        tolerance = {"rtol": 100 * torch.finfo(dtype).eps, "atol": 10 * torch.finfo(dtype).eps}
    for name, value in theirs.items():
        if value is None:
            assert ours[name] is None, f"{name}: {ours[name]} where {float_type.__name__} has none"
            continue
        assert ours[name] is not None, f"{name}: nothing where {float_type.__name__} has {value}"
        torch.testing.assert_close(
            ours[name], value, equal_nan=True, msg=lambda text, n=name: f"{n}, {constructor.kwargs}: {text}",
            **tolerance,
        )  # fmt: skip


def test_torch_has_samples_of_all_layers_but_these() -> None:
    """The six are covered by the samples of `tests.nn.quantized_samples` alone."""
    assert set(LAYER_FOR) - set(INFO) == WITHOUT_SAMPLES


@every_type
@train_and_eval
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_every_sample(float_type: type[nn.Module], dtype: torch.dtype, training: bool) -> None:
    info = INFO[float_type]
    assert dtype in info.dtypes
    found = samples(info, dtype, training)
    assert found
    for sample in found:
        assert_equals_torch(float_type, sample, dtype, training)
