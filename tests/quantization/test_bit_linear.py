"""BitLinear in every way that a layer is used; and the bugs it must not have. Packing: `test_bit_linear_packed`."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fuse_pass.nn import BitLinear

IN, OUT = 13, 6
VARIANTS = ("b1", "b1.58")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    grads = {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in module.named_parameters()}
    return {"y": y.detach(), "x.grad": x.grad, **grads}


# --- the seed ---------------------------------------------------------------------------------------------------------


def test_example_of_the_seed() -> None:
    # Initialize the BitLinear module
    linear = BitLinear(10, 20)

    # Create a random tensor of size (128, 10)
    input = torch.randn(128, 10)

    # Perform the forward pass
    output = linear(input)

    assert output.size() == torch.Size([128, 20])


def test_example_of_the_seed_with_groups() -> None:
    # Initialize the BitLinear module with 2 groups
    linear = BitLinear(10, 20, groups=2)
    input = torch.randn(128, 10)
    output = linear(input)
    assert output.size() == torch.Size([128, 20])


def test_example_of_the_seed_in_a_model() -> None:
    class MyModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = BitLinear(10, 20)

        def forward(self, x):
            return self.linear(x)

    model = MyModel()
    input = torch.randn(128, 10)
    output = model(input)
    assert output.size() == torch.Size([128, 20])


def test_starts_as_a_linear_does() -> None:
    torch.manual_seed(3)
    layer = BitLinear(IN, OUT, bias=True)
    torch.manual_seed(3)
    linear = nn.Linear(IN, OUT)
    for (name, ours), (expected_name, theirs) in zip(
        layer.state_dict().items(), linear.state_dict().items(), strict=True
    ):
        assert name == expected_name
        assert torch.equal(ours, theirs)
    assert list(BitLinear(IN, OUT).state_dict()) == ["weight"]
    assert "in_features=13, out_features=6, groups=1, bias=True, variant='b1'" in repr(layer)


# --- bugs not to repeat -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scale_of_the_weight_is_applied(variant: str, dtype: torch.dtype) -> None:
    layer, x = BitLinear(IN, OUT, variant=variant, dtype=dtype), torch.randn(5, IN).to(dtype)
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(8)
    torch.testing.assert_close(layer(x), 8 * y)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scale_of_the_input_is_applied(variant: str) -> None:
    layer, x = BitLinear(IN, OUT, variant=variant), torch.randn(5, IN)
    assert layer(x).abs().max() > 0.01
    torch.testing.assert_close(layer(100 * x), 100 * layer(x))
    torch.testing.assert_close(layer(-x), -layer(x))


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_are_blocks_of_output_rows_and_leave_the_batch_alone(variant: str, batch: int) -> None:
    layer, x = BitLinear(IN, OUT, groups=2, variant=variant), torch.randn(batch, IN)
    parts = []
    for rows in layer.weight.detach().chunk(2):
        part = BitLinear(IN, OUT // 2, variant=variant)
        part.load_state_dict({"weight": rows})
        parts.append(part(x))
    assert torch.equal(layer(x), torch.cat(parts, dim=1))
    assert not torch.equal(layer(x), BitLinear.from_float(as_linear(layer), variant=variant)(x))


def as_linear(layer: BitLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.load_state_dict(layer.state_dict())
    return linear


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_gets_a_gradient(variant: str) -> None:
    layer = BitLinear(IN, OUT, variant=variant)
    layer(torch.randn(5, IN)).square().sum().backward()
    assert (layer.weight.grad != 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_depend_on_each_other_by_the_tensor_scale_only(variant: str) -> None:
    layer, x = BitLinear(IN, OUT, variant=variant), torch.randn(4, IN)
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(layer(x), alone) == (variant == "b1.58")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("zero", ["x", "weight", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_zeros_give_the_bias(variant: str, dtype: torch.dtype, zero: str, packed: bool) -> None:
    layer, x = BitLinear(IN, OUT, groups=2, bias=True, variant=variant, dtype=dtype), torch.randn(5, IN).to(dtype)
    if zero != "x":
        nn.init.zeros_(layer.weight)
    x = x if zero == "weight" else torch.zeros_like(x)
    if packed:
        layer.pack()
    result = run(layer, x)
    assert torch.equal(result["y"], layer.bias.detach().expand(5, OUT))
    assert all(value.isfinite().all() for value in result.values())


# --- as a layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(IN,), (7, IN), (2, 3, IN), (2, 3, 4, IN), (0, IN), (2, 0, IN)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_rank_and_empty_batches(variant: str, shape: tuple[int, ...], packed: bool) -> None:
    layer, x = BitLinear(IN, OUT, bias=True, variant=variant), torch.randn(shape)
    if packed:
        layer.pack()
    result = run(layer, x)
    assert result["y"].shape == (*shape[:-1], OUT)
    assert result["x.grad"].shape == shape
    torch.testing.assert_close(result["y"], layer(x.reshape(-1, IN)).view(result["y"].shape))


@pytest.mark.parametrize(("in_features", "out_features"), [(0, OUT), (IN, 0)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_weights(variant: str, in_features: int, out_features: int) -> None:
    layer = BitLinear(in_features, out_features, bias=True, variant=variant)
    for candidate in (layer, copy.deepcopy(layer).pack(), copy.deepcopy(layer).pack().unpack()):
        assert torch.equal(run(candidate, torch.randn(3, in_features))["y"], layer.bias.detach().expand(3, -1))


def test_an_input_of_any_strides_may_be_written_to_after() -> None:
    layer, x = BitLinear(IN, OUT), torch.randn(IN, 5, 3).transpose(0, 2)
    y = layer(x)
    assert torch.equal(y, layer(x.contiguous()))
    y.mul_(2).sum().backward()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 7), torch.randn(3, IN).double(), torch.ones(3, IN, dtype=torch.long), torch.tensor(1.0)],
    ids=["size", "dtype", "integers", "0-d"],
)
def test_wrong_input_raises_what_a_linear_raises(x: Tensor, packed: bool) -> None:
    layer = BitLinear(IN, OUT, bias=True)
    linear = as_linear(layer)
    if packed:
        layer.pack()
    for autocast in (False, True):
        with torch.autocast("cpu", enabled=autocast):
            with pytest.raises(RuntimeError) as expected:
                linear(x)
            with pytest.raises(RuntimeError) as ours:
                layer(x)
        assert str(ours.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="device"):
        layer(torch.randn(3, IN, device="meta"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": 4}, ValueError, "divisor of out_features=6, got 4"),
        ({"groups": 0}, ValueError, "got 0"),
        ({"groups": -2}, ValueError, "got -2"),
        ({"groups": 2.0}, ValueError, "got 2.0"),
        ({"variant": "b2"}, ValueError, r"expected one of 'b1', 'b1\.58', got 'b2'"),
        ({"dtype": torch.int8}, TypeError, r"expected a floating-point dtype, got torch\.int8"),
        ({"dtype": torch.complex64}, TypeError, "complex64"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BitLinear(IN, OUT, **arguments)


def test_from_float_shares_the_parameters() -> None:
    linear = nn.Linear(IN, OUT).eval()
    layer = BitLinear.from_float(linear, 3, variant="b1.58")
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.groups, layer.variant, layer.training) == (3, "b1.58", False)
    assert layer(torch.randn(4, IN)).shape == (4, OUT)
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, got Conv1d"):
        BitLinear.from_float(nn.Conv1d(1, 1, 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_parametrised_weight(variant: str) -> None:
    layer, x = BitLinear(IN, OUT, variant=variant), torch.randn(4, IN)
    parametrizations.weight_norm(layer)
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original1.grad is not None
    with pytest.raises(RuntimeError, match="parametrised or pruned"):
        layer.pack()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_narrows_the_result_only(variant: str, packed: bool, dtype: torch.dtype) -> None:
    layer, x = BitLinear(IN, OUT, bias=True, variant=variant), torch.randn(5, IN)
    if packed:
        layer.pack()
    exact = run(layer, x)
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer(x), exact["y"].to(dtype))
        assert layer(x.to(dtype)).dtype is dtype
        result = run(layer, x)  # backward under autocast as well
    for name in ("x.grad", "weight", "bias"):
        if name in exact:
            assert result[name].dtype is torch.float32
            torch.testing.assert_close(result[name], exact[name], rtol=2e-2, atol=2e-2)


def test_transforms() -> None:
    layer, x = BitLinear(IN, OUT, variant="b1.58"), torch.randn(4, 3, IN)
    packed = copy.deepcopy(layer).pack()
    expected = run(layer, x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(layer(x), expected["y"])
    for module in (layer, packed):
        torch.testing.assert_close(torch.func.vmap(module)(x), expected["y"])
        gradient = torch.func.grad(lambda x, module=module: (module(x) ** 2).sum())(x)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad((module(leaf) ** 2).sum(), leaf)[0])
    parameters = dict(layer.named_parameters())
    per_sample = torch.func.vmap(
        torch.func.grad(lambda parameters, x: torch.func.functional_call(layer, parameters, (x,)).sum()), (None, 0)
    )(parameters, x)
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(per_sample["weight"].sum(0), layer.weight.grad)
    torch.testing.assert_close(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False), expected["y"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_penalty_trains(variant: str) -> None:
    layer, x = BitLinear(IN, OUT, bias=True, variant=variant), torch.randn(5, IN, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert (layer.weight.grad != 0).all()
    assert x.grad is not None


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "dtype", "backend"), [("b1", torch.float32, "inductor"), ("b1.58", torch.bfloat16, "fuse_pass")]
)
def test_compiled_is_eager_bit_for_bit(variant: str, dtype: torch.dtype, backend: str) -> None:
    layer, x = BitLinear(40, 24, 2, bias=True, variant=variant, dtype=dtype), torch.randn(10, 40).to(dtype)
    eager = run(layer, x)
    compiled = run(torch.compile(layer, backend=backend, fullgraph=True), x)
    assert torch.equal(compiled["y"], eager["y"])
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value)
    layer.pack()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), eager["y"])


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_with_dynamic_shapes_and_autocast(packed: bool) -> None:
    layer = BitLinear(40, 24, variant="b1")
    if packed:
        layer.pack()
    compiled = torch.compile(layer, backend="fuse_pass", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (5, 9, 30):
            x = torch.randn(rows, 3, 40)
            assert torch.equal(compiled(x), layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x), layer(x))


def test_exports() -> None:
    layer, x = BitLinear(IN, OUT, bias=True).eval(), torch.randn(3, IN)
    for candidate in (layer, copy.deepcopy(layer).pack()):
        program = torch.export.export(candidate, (x,))
        assert any("bit_linear" in str(node.target) for node in program.graph.nodes)
        assert torch.equal(program.module()(x), layer(x))


# --- training ---------------------------------------------------------------------------------------------------------


def accuracy_on_digits(first: nn.Module, second: nn.Module, *, compiled: bool = False) -> float:
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    x, target = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    model = nn.Sequential(first, nn.ReLU(), nn.LayerNorm(128), second)
    call = torch.compile(model, backend="fuse_pass", fullgraph=True) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for batch in itertools.chain.from_iterable(train[torch.randperm(1400)].split(100) for _ in range(25)):
        optimizer.zero_grad()
        F.cross_entropy(call(x[batch]), target[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        trained = (model.eval()(x[test]).argmax(1) == target[test]).float().mean().item()
        for layer in model:
            if isinstance(layer, BitLinear):
                layer.pack()
        packed = (model(x[test]).argmax(1) == target[test]).float().mean().item()
    assert packed == trained
    return trained


@pytest.mark.parametrize(("variant", "compiled"), [("b1", False), ("b1.58", False), ("b1.58", True)])
def test_trains_on_digits(variant: str, compiled: bool) -> None:
    accuracy = accuracy_on_digits(
        BitLinear(64, 128, variant=variant, bias=True),
        BitLinear(128, 10, variant=variant, bias=True),
        compiled=compiled,
    )
    assert accuracy > 0.95  # nn.Linear: 0.98
