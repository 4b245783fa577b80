"""What a contender is, and what it is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuse_pass.bench.contenders import tensors_of
from fuse_pass.commands.errors import CommandError
from fuse_pass.commands.named_models import Example

# Kinds of arithmetic. FLOAT: the model as it is, in float32 or bfloat16. INT8: weights and inputs in int8, whose scales
# are taken while it runs. The weight-only ones: int8 with a scale per output, int4 with one per 64 inputs.
FLOAT, INT8, INT8_WEIGHT_ONLY, INT4_WEIGHT_ONLY = "float", "int8", "int8_weight_only", "int4_weight_only"
KINDS = (FLOAT, INT8, INT8_WEIGHT_ONLY, INT4_WEIGHT_ONLY)
GROUP = 64


@dataclass(frozen=True)
class Task:
    """One call of a model in evaluation mode, on a CPU.

    Attributes:
        example: the float model and its inputs; whoever changes the model copies it first.
        kind: one of `KINDS`.
        threads: that it may run on.
    """

    example: Example
    kind: str
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters; float32 where there are none."""
        parameters = self.example.model.parameters()
        return next((tensor.dtype for tensor in parameters if tensor.is_floating_point()), torch.float32)

    def positional(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model as a module that takes tensors by position, and those tensors, for exporters.

        Raises:
            CommandError: an input is no tensor.
        """
        args, kwargs = self.example.args, self.example.kwargs
        inputs = (*args, *kwargs.values())
        if not all(isinstance(value, Tensor) for value in inputs):
            raise CommandError("expected inputs that are tensors, got others, which no exporter takes")
        model = _ByPosition(self.example.model, len(args), tuple(kwargs)) if kwargs else self.example.model
        return model, tuple(tensor.detach() for tensor in inputs)


class _ByPosition(nn.Module):
    def __init__(self, model: nn.Module, positional: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.positional, self.names = model, positional, names

    def forward(self, *inputs: Tensor) -> Any:
        named = dict(zip(self.names, inputs[self.positional :], strict=True))
        return self.model(*inputs[: self.positional], **named)


@dataclass(frozen=True)
class Built:
    """A call that is ready to be timed, and how the tensors of its result are read."""

    call: Callable[[], Any]
    read: Callable[[Any], list[Tensor]] = tensors_of


@dataclass(frozen=True)
class Contender:
    """A library, in a row.

    Attributes:
        name: as written after `--against`.
        needs: the modules that it imports.
        install: what `pip install` installs them.
        build: how a call is made, by kind; a kind that is not there it does not have.
        is_apart: whether importing it changes PyTorch for everybody, so that it runs in a process of its own.
    """

    name: str
    needs: tuple[str, ...]
    install: str
    build: Mapping[str, Callable[[Task], Built]]
    is_apart: bool = False


def under_no_grad(call: Callable[..., Any], example: Example) -> Callable[[], Any]:
    """The call of an example, as a function without arguments."""

    def run() -> Any:
        with torch.no_grad():
            return call(*example.args, **example.kwargs)

    return run
