"""What a model does in two calls with different data, weights and masks: all that a user could notice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuse_pass.inductor import debugging, private
from fuse_pass.inductor.settings import memory_budget, stock_random_numbers
from fuse_pass.testing import masks

ROUNDS = 2

# What rows may be instead of normally distributed: constant, with one of these values, or so many times as large. The
# constants are such that their rounded mean is another number; the square of a huge number overflows in float32.
_CONSTANTS = (0.0, 0.2, -3.0, 2000.0, 11898.57421875, 1e6 + 1 / 16)
UNUSUAL_ROWS: dict[str, tuple[bool, tuple[float, ...]]] = {
    "constant": (True, _CONSTANTS),
    "large": (False, (1e3, 1e6)),
    "huge": (False, (1e30,)),
    "huge and constant": (True, (1e30, -1e28)),
    "tiny": (False, (1e-30, 1e-41)),
}


@dataclass(frozen=True)
class Round:
    """One call, forward and backward.

    Attributes:
        outputs: what was returned, detached.
        grads: of inputs and parameters by name; None where there is none.
        inputs: the arguments as the call left them.
        requires_grad: of the outputs.
        buffers: of the model, by name.
        aliases: which outputs share memory with which arguments or outputs.
        draws: whether a mask was drawn.
        moves_generator: whether the state of PyTorch's generator changed.
        writes_inputs: whether any argument was written to.
    """

    outputs: tuple[Tensor, ...]
    grads: dict[str, Tensor | None]
    inputs: tuple[Tensor, ...]
    requires_grad: tuple[bool, ...]
    buffers: dict[str, Tensor]
    aliases: frozenset[tuple[str, str]]
    draws: bool
    moves_generator: bool
    writes_inputs: bool = False


def build(namespace: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model of a program, in train or eval mode; its weights are set by `observe`."""
    model: nn.Module = namespace["Model"]().to(dtype)
    return model.train(namespace["SETTINGS"]["training"])


def observe(
    namespace: dict[str, Any],
    model: nn.Module,
    call: Callable[..., Any],
    dtype: torch.dtype,
    seed: int,
    *,
    scale: float = 1.0,
) -> list[Round]:
    """Calls `call` (the model, or what it was compiled to) once per round.

    Args:
        namespace: of the program's text.
        model: holds the parameters and buffers.
        call: takes the inputs.
        dtype: of parameters and inputs, whose values are those of the program's own dtype.
        seed: of weights, data and masks.
        scale: what the inputs are multiplied by.
    """
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.ones_like(buffer) if name.endswith("var") else torch.zeros_like(buffer))
    settings = namespace["SETTINGS"]
    with (
        stock_random_numbers() if settings["fallback_random"] else contextlib.nullcontext(),
        memory_budget(settings["budget"]),
    ):
        return [_round(namespace, model, call, dtype, seed, i, scale) for i in range(ROUNDS)]


def _round(
    namespace: dict[str, Any],
    model: nn.Module,
    call: Callable[..., Any],
    dtype: torch.dtype,
    seed: int,
    i: int,
    scale: float,
) -> Round:
    settings = namespace["SETTINGS"]
    stored = getattr(torch, settings["dtype"])
    generator = torch.Generator().manual_seed(1000 * seed + i)
    _fill(model, stored, generator)
    leaves = list(_leaves(namespace, stored, dtype, generator, i, scale))
    # Copies, so that a model may write into its inputs.
    inputs = [leaf.clone() for leaf in leaves]
    if settings["dynamic"]:
        for tensor in inputs:
            debugging.maybe_mark_dynamic(tensor, 0)
    model.zero_grad()
    with masks.drawn_from(7919 * seed + i) as draws:
        with torch.enable_grad() if settings["grad"] else torch.no_grad(), _autocast(settings, dtype):
            result = call(*inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        roots = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad and y.is_floating_point()]
        masks.begin_backward()
        if settings["grad"] and roots:
            torch.autograd.backward(roots, [uneven(y) for y in roots])
    return Round(
        outputs=tuple(y.detach() for y in outputs),
        grads={
            **{f"input {j}": leaf.grad for j, leaf in enumerate(leaves)},
            **{f"parameter {name}": parameter.grad for name, parameter in model.named_parameters()},
        },
        inputs=tuple(x.detach() for x in inputs),
        buffers={name: buffer.clone() for name, buffer in model.named_buffers()},
        requires_grad=tuple(y.requires_grad for y in outputs),
        aliases=frozenset(aliases(inputs, outputs)),
        draws=draws.any,
        moves_generator=draws.moves_generator,
        writes_inputs=any(private.version_of(x) > 0 for x in inputs),
    )


def _autocast(settings: dict[str, Any], dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """The float64 reference has no autocast: it is what both dtypes approximate."""
    if settings["autocast"] and dtype is getattr(torch, settings["dtype"]):
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def _fill(model: nn.Module, stored: torch.dtype, generator: torch.Generator) -> None:
    """Weights of the size of usual ones, every scale near 1 and every bias different from 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            values = values / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.7 + 0.4 * values
            parameter.copy_(values.to(stored))


def _leaves(
    namespace: dict[str, Any],
    stored: torch.dtype,
    dtype: torch.dtype,
    generator: torch.Generator,
    i: int,
    scale: float,
) -> Iterator[Tensor]:
    settings = namespace["SETTINGS"]
    unusual = _Unusual(settings["rows"], generator) if settings["rows"] else None
    for j, (shape, requires_grad) in enumerate(namespace["INPUTS"]):
        batch = shape[0] + i if settings["dynamic"] else shape[0]
        value = torch.randn((batch, *shape[1:]), generator=generator, dtype=torch.float64)
        value = value if unusual is None else unusual.of(value)
        if settings["special"] and j == 0 and value.numel():
            value[0, ..., 0, 0], value[-1, ..., -1, 1] = torch.nan, torch.inf
        yield (value.to(stored).to(dtype) * scale).requires_grad_(requires_grad and settings["grad"])


class _Unusual:
    """About half of the rows, or all, replaced in the same way in every input, so that sums of them are such rows too.

    Args:
        kind: one of `UNUSUAL_ROWS`.
        generator: of the choices.
    """

    def __init__(self, kind: str, generator: torch.Generator) -> None:
        self._constant, choices = UNUSUAL_ROWS[kind]
        self._generator = generator
        self._lowest = int(self._below(3) == 0)  # all of the rows, or about half of them
        # As float32 has it, so that float64 sums many of them exactly: of 1e30 itself its mean would be another number.
        self._size = torch.tensor(choices[self._below(len(choices))], dtype=torch.float32).item()
        self._chosen: Tensor | None = None

    def _below(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self._generator))

    def of(self, value: Tensor) -> Tensor:
        """`value [..., columns]` with its rows replaced."""
        rows = value.shape[:-1]
        if self._chosen is None or self._chosen.shape[:-1] != rows:
            # Not `torch.rand`, which may be replaced (`masks.in_eager`).
            self._chosen = torch.randint(self._lowest, 2, (*rows, 1), generator=self._generator) == 1
        return torch.where(self._chosen, self._size if self._constant else self._size * value, value)


def uneven(like: Tensor) -> Tensor:
    """A gradient for an output, no two elements of which are equal."""
    values = torch.linspace(-1.0, 2.0, like.numel(), dtype=torch.float64)
    return values.view(like.shape).to(like.dtype)


def aliases(inputs: list[Tensor], outputs: tuple[Tensor, ...]) -> Iterator[tuple[str, str]]:
    """Pairs of names that share memory, arguments with each other left out."""
    owners: dict[int, str] = {}
    named = [(f"input {i}", x) for i, x in enumerate(inputs)] + [(f"output {i}", y) for i, y in enumerate(outputs)]
    for name, tensor in named:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer and pointer in owners and not (name.startswith("input")):
            yield owners[pointer], name
        owners.setdefault(pointer, name)
