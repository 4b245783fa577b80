"""PyTorch's own samples of functions (OpInfo) and modules (ModuleInfo) through the pass and AOTAutograd equal eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_leaves, tree_map

from fuse_pass.report import Report, collect
from fuse_pass.testing import levels, masks

# Tight, because in float64 the only difference that a right result may show is the order of a sum.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}

FUNCTIONS = (
    "nn.functional.linear", "addmm", "matmul", "einsum", "nn.functional.conv1d", "nn.functional.conv2d",
    "nn.functional.gelu", "nn.functional.silu", "nn.functional.relu", "nn.functional.leaky_relu", "nn.functional.elu",
    "nn.functional.selu", "nn.functional.mish", "nn.functional.prelu", "nn.functional.hardswish", "softmax",
    "nn.functional.dropout", "nn.functional.layer_norm", "nn.functional.rms_norm", "nn.functional.group_norm",
    "nn.functional.batch_norm", "nn.functional.scaled_dot_product_attention", "nn.functional.embedding", "add", "mul",
)  # fmt: skip
MODULES = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.GELU, nn.SiLU, nn.ReLU, nn.PReLU, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm,
    nn.BatchNorm1d, nn.Embedding, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
    nn.TransformerEncoder, nn.Transformer,
)  # fmt: skip

OPS = {f"{info.name} {info.variant_test_name}".strip(): info for info in op_db if info.name in FUNCTIONS}
INFO = {info.module_cls: info for info in module_db if info.module_cls in MODULES}


def test_there_are_samples_of_everything() -> None:
    assert {info.name for info in OPS.values()} == set(FUNCTIONS)
    assert set(INFO) == set(MODULES)


def alone(y: Any) -> Any:
    return y


def before_the_patterns(y: Any) -> Any:
    """The result is read by a whole feed-forward block, so that a product becomes its first Linear."""
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.dim() == 0:
        return y
    n = y.shape[-1]
    weight = torch.linspace(-1, 1, 7 * n, dtype=y.dtype).view(7, n)
    z = F.dropout(F.linear(F.gelu(y), weight), 0.25)
    return F.layer_norm(z + 0.5 * z.flip(-1), (7,))


def leaf(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def observed(function: Callable[..., Any], arguments: Any, parameters: Any = ()) -> dict[str, Tensor | None]:
    """Outputs and gradients; the arguments are copied, because some samples work in place."""
    leaves = tree_map(leaf, arguments)
    args, kwargs = tree_map(copied, leaves)
    with masks.drawn_from(5):
        outputs = [y for y in tree_leaves(function(*args, **kwargs)) if isinstance(y, Tensor)]
        roots = [y for y in outputs if y.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.full_like(y, 0.7) * (y.detach() + 1) for y in roots])
    tensors = [x for x in tree_leaves(leaves) if isinstance(x, Tensor)]
    return {
        **{f"output {i}": y.detach() for i, y in enumerate(outputs)},
        **{f"gradient of input {i}": x.grad for i, x in enumerate(tensors)},
        **{f"gradient of {name}": parameter.grad for name, parameter in parameters},
    }


def assert_same(ours: dict[str, Tensor | None], eager: dict[str, Tensor | None]) -> None:
    assert ours.keys() == eager.keys()
    for name, expected in eager.items():
        found = ours[name]
        assert (found is None) == (expected is None), f"{name}: {found}, eager has {expected}"
        if found is not None and expected is not None:
            assert found.stride() == expected.stride() or name.startswith("gradient"), name
            torch.testing.assert_close(found, expected, equal_nan=True, **TOLERANCE)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend=levels.fused("aot"))


def op_samples(info: OpInfo) -> Iterator[SampleInput]:
    torch.manual_seed(0)
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        if not sample.kwargs.get("dropout_p"):  # attention's own dropout draws other numbers when it is decomposed
            yield sample


def check_op(info: OpInfo, samples: list[SampleInput], behind: Callable[[Any], Any]) -> Report:
    name = info.name.removeprefix("nn.functional.")

    def function(*args: Any, **kwargs: Any) -> Any:
        # The function itself, looked up late: some entries wrap it in what Dynamo does not trace; that of the
        # embedding swaps its arguments.
        op = info.op if name in (info.name, "embedding") else getattr(F, name)
        return behind(op(*args, **kwargs))

    with levels.ready_to_compare(), collect() as report:
        for sample in samples:
            arguments = ((sample.input, *sample.args), sample.kwargs)
            with masks.in_eager():
                expected = observed(function, arguments)
            assert_same(observed(compiled(function), arguments), expected)
    return report


@pytest.mark.parametrize("name", OPS)
def test_first_sample_of_a_function(name: str) -> None:
    check_op(OPS[name], list(op_samples(OPS[name]))[:1], before_the_patterns)


@pytest.mark.slow
@pytest.mark.parametrize("behind", [alone, before_the_patterns], ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", OPS)
def test_every_sample_of_a_function(name: str, behind: Callable[[Any], Any]) -> None:
    report = check_op(OPS[name], list(op_samples(OPS[name])), behind)
    assert report.graphs > 0
    if behind is before_the_patterns:
        assert report.counts()["dropout_norm"] > 0
        assert name != "nn.functional.linear" or report.counts()["dense_act_dense"] > 0


def check_module(info: ModuleInfo, training: bool, first: bool) -> None:
    torch.manual_seed(0)
    found: list[ModuleInput] = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    for sample in found[:1] if first else found:
        constructor, call = sample.constructor_input, sample.forward_input
        module = info.module_cls(*constructor.args, **constructor.kwargs).double().train(training)
        twin = copy.deepcopy(module)
        with levels.ready_to_compare():
            with masks.in_eager():
                expected = observed(twin, (call.args, call.kwargs), list(twin.named_parameters()))
            ours = observed(compiled(module), (call.args, call.kwargs), list(module.named_parameters()))
        assert_same(ours, expected)
        for (name, a), (_, b) in zip(module.named_buffers(), twin.named_buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE)


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_first_sample_of_a_module(kind: type[nn.Module]) -> None:
    check_module(INFO[kind], training=True, first=True)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_every_sample_of_a_module(kind: type[nn.Module], training: bool) -> None:
    check_module(INFO[kind], training, first=False)
