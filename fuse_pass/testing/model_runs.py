"""A whole model as something to compare: eager, stock and fused runs in three calls, the last with another batch."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fuse_pass.inductor.debugging import GROUPED_PRODUCT, BatchNorm, counters, tree_leaves, tree_map
from fuse_pass.testing import levels, masks, products
from fuse_pass.testing.differences import Runs
from fuse_pass.testing.observe import Round, aliases, uneven

Call = Callable[..., Any]


@dataclass(frozen=True)
class Compilations:
    """What Dynamo did during the three calls.

    Attributes:
        graphs: compiled graphs, those of recompilations included.
        frames: compiled frames by outcome.
        breaks: graph breaks by reason.
    """

    graphs: int
    frames: dict[str, int]
    breaks: dict[str, int]


class ModelRuns:
    """The contenders (`compare.Contenders`) of a model.

    Its parameters are changed at random, so that no bias is 0 and no scale 1; so are its floating-point arguments.
    In train mode gradients are taken, in eval mode everything runs under `no_grad`.

    Args:
        model: a float32 module; its parameters and buffers change.
        args: its positional arguments. The first size of the first tensor is the batch.
        kwargs: its keyword arguments.
        training: train or eval.
        level: what stands behind fuse_pass, one of `levels.LEVELS`.
        compiler: `torch.compile`, or what takes its place.
        batch_statistics: whether batch norms in train mode read the batch, or what they have kept.

    Attributes:
        compilations: what Dynamo did, run by run.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        training: bool,
        level: str = "aot",
        compiler: Callable[..., Call] = torch.compile,
        batch_statistics: bool = True,
    ) -> None:
        self.level, self.seed, self.training = level, 0, training
        self.compilations: list[Compilations] = []
        self._compiler = compiler
        self._narrow = model.train(training)
        for module in model.modules():
            if isinstance(module, BatchNorm) and not batch_statistics:
                module.eval()
        self._state = {name: value.detach().clone() for name, value in _state(model).items()}
        self._wide = copy.deepcopy(model).double()
        self._inputs = [(args, dict(kwargs)), (args, dict(kwargs)), _one_more((args, dict(kwargs)))]

    def compiled(self, backend: levels.Backend) -> Callable[[int], Runs]:
        torch.compiler.reset()
        call = self._compiler(self._narrow, backend=backend)

        def run(seed: int) -> Runs:
            counters.clear()
            runs = self._observed(self._narrow, call, seed)
            graphs, frames, breaks = counters["stats"]["unique_graphs"], counters["frames"], counters["graph_break"]
            self.compilations.append(Compilations(graphs, dict(frames), dict(breaks)))
            return runs

        return run

    def eager(self, seed: int) -> Runs:
        with masks.in_eager():
            return self._observed(self._narrow, self._narrow, seed)

    def exact(self, seed: int) -> Runs:
        with masks.in_eager():
            return self._observed(self._wide, self._wide, seed)

    def by_onednn(self, seed: int) -> Runs | None:
        with products.OneDNNProducts():
            return self.eager(seed)

    def nearby(self, seed: int) -> None:
        """Data of real models are no unusual ones."""

    def in_float32(self, seed: int) -> Runs | None:
        return None  # no model computes in float64

    def _observed(self, model: nn.Module, call: Call, seed: int) -> Runs:
        return [self._round(model, call, seed, i) for i in range(len(self._inputs))]

    def _round(self, model: nn.Module, call: Call, seed: int, i: int) -> Round:
        generator = torch.Generator().manual_seed(1000 * seed + i)
        self._fill(model, generator)
        wide = model is self._wide
        leaves = tree_map(lambda value: _other_data(value, wide, self.training, generator), self._inputs[i])
        # Copies, so that a model may write into its inputs.
        args, kwargs = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, leaves)
        model.zero_grad()
        random.seed(seed)
        torch.manual_seed(seed)
        with (
            masks.drawn_from(7919 * seed + i) as draws,
            torch.set_grad_enabled(self.training),
            _in_float64() if wide else contextlib.nullcontext(),
        ):
            outputs = list(_tensors(call(*args, **kwargs)))
            roots = [y for y in outputs if y.requires_grad and y.is_floating_point()]
            masks.begin_backward()
            if roots:
                torch.autograd.backward(roots, [uneven(y) for y in roots])
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        gradients = {f"input {j}": leaf.grad for j, leaf in enumerate(tree_leaves(leaves)) if isinstance(leaf, Tensor)}
        return Round(
            outputs=tuple(y.detach().clone() for y in outputs),
            grads={**gradients, **{f"parameter {name}": p.grad for name, p in model.named_parameters()}},
            inputs=tuple(x.detach() for x in inputs),
            requires_grad=tuple(y.requires_grad for y in outputs),
            buffers={name: buffer.clone() for name, buffer in model.named_buffers()},
            aliases=frozenset(aliases(inputs, tuple(outputs))),
            draws=draws.any,
            moves_generator=draws.moves_generator,
        )

    def _fill(self, model: nn.Module, generator: torch.Generator) -> None:
        """Parameters up to a fifth away from their first values; buffers as they were."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in _state(model).items():
                old = self._state[name]
                if name in parameters and old.is_floating_point():
                    noise = torch.randn(old.shape, generator=generator)
                    old = old + 0.2 * noise * (1 if old.dim() < 2 else old.abs().mean())
                value.copy_(old)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _other_data(value: Any, wide: bool, requires_grad: bool, generator: torch.Generator) -> Any:
    """Integers and masks stay as they are."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    changed = value + 0.2 * torch.randn(value.shape, generator=generator)
    return (changed.double() if wide else changed).requires_grad_(requires_grad)


def _one_more(arguments: Any) -> Any:
    """The arguments with the first element of the batch once more at its end."""
    batch = next(x.shape[0] for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.dim())
    return tree_map(
        lambda x: torch.cat([x, x[:1]]) if isinstance(x, Tensor) and x.dim() and x.shape[0] == batch else x, arguments
    )


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Every tensor of a result, those of a key-value cache included."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, torch.device)) and depth:
            yield from _tensors(list(vars(leaf).values()), depth - 1)


class _InFloat64(TorchFunctionMode):
    """Casts to narrower dtypes become casts to float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if function is GROUPED_PRODUCT:  # which takes no float64
            return _grouped_product(*args, **(kwargs or {}))
        return function(*tree_map(_wide, args), **tree_map(_wide, kwargs or {}))


def _grouped_product(x: Tensor, weights: Tensor, *, offs: Tensor, **defaults: Any) -> Tensor:
    """`x [rows, k]` in groups that end at `offs [g]`, each times its own of `weights [g, k, n]`."""
    ends = offs.tolist()
    parts = [x[start:end] @ weight for start, end, weight in zip([0, *ends], ends, weights, strict=False)]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - ends[-1], weights.shape[-1])])


def _wide(value: Any) -> Any:
    return torch.float64 if value in (torch.float32, torch.bfloat16, torch.float16) else value


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            yield
    finally:
        torch.set_default_dtype(before)
