"""Training with less memory than PyTorch would take: what is computed again in backward must be the same numbers.

A derivative is compared with a difference quotient under the same seed. Another mask in backward is far off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.compile_fx as inductor
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

import fuse_pass
from fuse_pass import fuse_backend
from fuse_pass.backend import FuseBackend
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.quantization.functional import FloatPrecisionSimulator, fake_quantize

WIDTH, HIDDEN, P = 8, 24, 0.4
BUDGETS = (0.7, 0.5, 0.2, 0.0)


def layer(inside: int = WIDTH, out: int = WIDTH) -> nn.Linear:
    return nn.Linear(inside, out)


class Feedforward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layer(WIDTH, HIDDEN), layer(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.dropout(F.gelu(self.first(x)), P))
        return y


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = layer(WIDTH, HIDDEN), layer(WIDTH, HIDDEN), layer(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.dropout(F.silu(self.gate(x)) * self.up(x), P))
        return y


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = layer(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.dropout(self.first(x), P)).tanh()


class Attention(nn.Module):
    """Its mask becomes one of ours because a pattern matches elsewhere in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.after = layer(), layer(), layer(), Feedforward()

    def forward(self, x: Tensor) -> Tensor:
        x = x[None, None]
        y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), dropout_p=P)
        return self.after(y)[0, 0]  # type: ignore[no-any-return]


class OtherDropout(nn.Module):
    """No pattern takes the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = layer(), Feedforward()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(F.dropout(self.before(x).tanh(), P).sin())
        return y


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = layer(), fuse_pass.nn.FusedDropoutLayerNorm(WIDTH, P)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x).tanh(), x).tanh()  # type: ignore[no-any-return]


class Rounded(nn.Module):
    """Gradients pass straight through a rounding, so only what is linear in what was rounded can be compared."""

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rounded, self.last = rounded, layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rounded(x.sin())).tanh()  # type: ignore[no-any-return]


def rounded(fmt: str, **options: Any) -> Rounded:
    return Rounded(functools.partial(fake_quantize, fmt=fmt, rounding="stoc_prop", **options))


STOCHASTIC = Site("fp8_e4m3", rounding="stoc_prop")


def quantized_layer() -> nn.Module:
    """Quantises its input alone, for the reason that `Rounded` gives."""
    return fuse_pass.convert(nn.Sequential(layer()), QuantSpec(input=STOCHASTIC))


OURS: dict[str, Callable[[], nn.Module]] = {
    "feedforward": Feedforward,
    "gated": Gated,
    "norm": Norm,
    "attention": Attention,
    "other dropout": OtherDropout,
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "own norm": OwnNorm,
    "quantized layer": quantized_layer,
    "fp8": functools.partial(rounded, "fp8_e4m3"),
    "int8": functools.partial(rounded, "int8"),
    "mxfp8": functools.partial(rounded, "mxfp8"),
    "simulator": lambda: Rounded(FloatPrecisionSimulator(4, 3, "stoc_prop", generator_seed=3)),
}
CASES = [*((name, "fuse_pass") for name in OURS | MODULES), *((name, "inductor") for name in MODULES)]


def in_checkpoint(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return functools.partial(checkpoint, model, use_reentrant=False)


def in_region(budget: float, model: nn.Module) -> Callable[[Tensor], Tensor]:
    if not hasattr(torch.autograd.graph, "region_activation_memory_budget"):
        pytest.skip("this PyTorch has no budgets of regions")

    def call(x: Tensor) -> Tensor:
        with torch.autograd.graph.region_activation_memory_budget(budget):
            y: Tensor = model(x)
            return y

    return call


def results_of(module: GraphModule) -> list[Node]:
    (results,) = module.graph.output_node().args
    assert isinstance(results, (tuple, list))
    return [result for result in results if isinstance(result, Node)]


@pytest.fixture
def graphs() -> list[GraphModule]:
    """What was compiled: of a training step the forward comes first."""
    return []


@pytest.fixture
def no_code(graphs: list[GraphModule]) -> Iterator[None]:
    """Inductor up to the forward and the backward graph, which then run as they are: it saves the C++ compiler."""

    def run_as_it_is(gm: GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return make_boxed_func(gm.forward)  # type: ignore[no-any-return]

    until_then = functools.partial(inductor.compile_fx, inner_compile=run_as_it_is)
    with (
        mock.patch.object(inductor, "compile_fx", until_then),
        mock.patch.object(torch.compiler.config, "force_disable_caches", True),
    ):
        yield


def derivatives(
    model: nn.Module,
    backend: Any,
    call: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda model: model,
    rows: int = 6,
) -> tuple[float, float]:
    """Along one direction in all parameters: by backward, and by a difference quotient."""
    model = model.double()
    x, weights = torch.randn(2, rows, WIDTH, dtype=torch.float64)
    parameters = list(model.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]
    seeds = [part.rounded._next_seed for part in model.modules() if isinstance(part, Rounded) and is_counting(part)]
    compiled = torch.compile(call(model), backend=backend, fullgraph=True)

    def loss() -> Tensor:
        torch.manual_seed(5)
        for seed in seeds:
            seed.fill_(3)
        return (compiled(x) * weights).sum()

    def moved_by(step: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
        return loss().item()

    loss().backward()
    products = [(p.grad * d).sum() for p, d in zip(parameters, directions, strict=True) if p.grad is not None]
    assert len(products) == len(parameters)
    step = 1e-6
    difference = moved_by(step) - moved_by(-2 * step)
    return float(sum(products)), difference / (2 * step)


def is_counting(part: Rounded) -> bool:
    return isinstance(part.rounded, FloatPrecisionSimulator)


def assert_right(model: nn.Module, backend: Any, **options: Any) -> None:
    by_backward, by_difference = derivatives(model, backend, **options)
    assert by_backward == pytest.approx(by_difference, rel=1e-6, abs=1e-6)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(
    ("name", "backend", "budget"),
    [
        ("feedforward", "fuse_pass", 0.0),
        ("norm", "fuse_pass", 0.0),
        ("other dropout", "fuse_pass", 0.5),
        ("own norm", "inductor", 0.5),
        ("own norm", "inductor", 0.0),
        ("fp8", "inductor", 0.0),
        ("simulator", "inductor", 0.0),
        *(pytest.param(*case, budget, marks=pytest.mark.slow) for case in CASES for budget in BUDGETS),
    ],
)
def test_every_draw_of_ours_is_kept(name: str, backend: str, budget: float) -> None:
    model = (OURS | MODULES)[name]()
    with functorch_config.patch(activation_memory_budget=budget), fuse_pass.collect() as report:
        assert_right(model, FuseBackend(strict=True) if backend == "fuse_pass" else backend)
    assert bool(report.matches) == (name in OURS)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("budget", [0.5, 0.0])
def test_draws_that_quantize_inserts(budget: float) -> None:
    """The weights are not rounded, so that the result is linear in each."""
    backend = FuseBackend(quantize=QuantSpec(input=STOCHASTIC), strict=True)
    with functorch_config.patch(activation_memory_budget=budget):
        assert_right(nn.Sequential(layer()), backend)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("backend", [fuse_backend, "inductor"])
def test_a_budget_of_zero_keeps_inputs_and_seeds(backend: Any, graphs: list[GraphModule]) -> None:
    with functorch_config.patch(activation_memory_budget=0.0):
        assert_right(OwnNorm(), backend, rows=500)  # of fewer, PyTorch keeps what takes less than the parameters
    (y, *kept), inputs = results_of(graphs[0]), graphs[0].graph.find_nodes(op="placeholder")
    assert y.meta["val"].shape == (500, WIDTH)
    assert [(value.meta["val"].shape, value.meta["val"].dtype) for value in kept if value not in inputs] == [
        ((), torch.int64)
    ]


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("backend", [fuse_backend, "inductor"])
@pytest.mark.parametrize("budget", [0.5, 0.0])
def test_inside_a_region_that_is_compiled_once(budget: float, backend: Any) -> None:
    """Its body has a forward and a backward of its own."""
    again = budget == 0 and torch.__version__ < "2.13"  # this PyTorch runs the region again, and our marks are inside
    refusal = pytest.raises(Exception, match="a random draw of fuse_pass in a subgraph") if again else nullcontext()
    with functorch_config.patch(activation_memory_budget=budget), refusal:
        assert_right(OwnNorm(), backend, call=torch.compiler.nested_compile_region)


@pytest.mark.usefixtures("no_code")
@pytest.mark.skipif(torch.__version__ < "2.14", reason="this PyTorch refuses every draw in a region with a budget")
@pytest.mark.parametrize("make", [Feedforward, OtherDropout, OwnNorm])
@pytest.mark.parametrize("budget", [0.5, 0.0])
def test_regions_with_a_budget_of_their_own(make: Callable[[], nn.Module], budget: float) -> None:
    assert_right(make(), FuseBackend(strict=True), call=functools.partial(in_region, budget))


@pytest.mark.usefixtures("no_code")
def test_without_our_backend_a_region_with_nothing_to_keep_is_refused() -> None:
    with pytest.raises(RuntimeError, match="region_activation_memory_budget: expected a budget above 0"):
        assert_right(OwnNorm(), "inductor", call=functools.partial(in_region, 0.0))


def test_partitions_without_inductor() -> None:
    """There our op is not decomposed."""
    for budget in (0.5, 0.0):
        torch.compiler.reset()
        with functorch_config.patch(activation_memory_budget=budget):
            assert_right(OwnNorm(), "aot_eager_decomp_partition")


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_checkpoints_without_inductor(backend: str) -> None:
    """A checkpoint draws again from the generator's state, unless what was drawn is kept."""
    assert_right(OwnNorm(), backend, call=in_checkpoint)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("make", [OtherDropout, OwnNorm])
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.0])
def test_checkpoints(make: Callable[[], nn.Module], budget: float) -> None:
    with functorch_config.patch(activation_memory_budget=budget):
        assert_right(make(), FuseBackend(strict=True), call=in_checkpoint)
