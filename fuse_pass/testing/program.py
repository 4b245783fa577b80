"""A random model as data: statements that can be dropped one by one, and its text, which is also its reproduction."""

from __future__ import annotations

import linecache
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """How a model is run.

    Attributes:
        seed: of its data and its dropout masks.
        dtype: name of the dtype of parameters and inputs.
        training: train or eval.
        grad: whether gradients are taken; else everything runs under `no_grad`.
        dynamic: whether the batch is marked dynamic, and another one in the second round.
        autocast: whether the caller opens an autocast region around the model.
        special: whether the inputs hold NaN and infinities.
        fallback_random: whether the user asks for eager's random numbers.
        rows: which rows of the inputs are not ordinary, one of `observe.UNUSUAL_ROWS`; empty for none.
        budget: `activation_memory_budget`, which decides what is computed again in backward.
    """

    seed: int = 0
    dtype: str = "float32"
    training: bool = True
    grad: bool = True
    dynamic: bool = False
    autocast: bool = False
    special: bool = False
    fallback_random: bool = False
    rows: str = ""
    budget: float = 1.0


@dataclass(frozen=True)
class Statement:
    """One step of `forward`.

    Attributes:
        target: the value that it defines; empty if it only writes into others.
        lines: its text.
        stand_in: a value of the same shape and dtype that can take the target's place; empty if there is none.
        shape: of the target, if an argument of `forward` can take its place; else None.
    """

    target: str
    lines: tuple[str, ...]
    stand_in: str = ""
    shape: tuple[int, ...] | None = None

    def mentions(self, name: str) -> bool:
        return any(re.search(rf"\b{name}\b", line) for line in self.lines)

    def with_name(self, old: str, new: str) -> Statement:
        lines = tuple(re.sub(rf"\b{old}\b", new, line) for line in self.lines)
        return replace(self, lines=lines, stand_in=new if self.stand_in == old else self.stand_in)


@dataclass(frozen=True)
class Input:
    """A floating-point argument of `forward`; the first size is the batch."""

    name: str
    shape: tuple[int, ...]
    requires_grad: bool = True


@dataclass(frozen=True)
class Program:
    """A model.

    Attributes:
        inputs: arguments of `forward`.
        statements: its steps.
        outputs: the values that it returns.
        members: `__init__` lines by name of the member; those that no step mentions are left out of the text.
        helpers: definitions outside of the class by name, likewise.
        settings: how it is run.
    """

    inputs: tuple[Input, ...]
    statements: tuple[Statement, ...]
    outputs: tuple[str, ...]
    members: Mapping[str, str] = field(default_factory=dict)
    helpers: Mapping[str, str] = field(default_factory=dict)
    settings: Settings = Settings()

    def without(self, statement: Statement) -> Program | None:
        """The program with the stand-in of the statement, or a new argument, in its place; None where neither fits."""
        rest = [other for other in self.statements if other is not statement]
        later = self.statements[self.statements.index(statement) + 1 :]
        is_read = statement.target in self.outputs or any(other.mentions(statement.target) for other in later)
        if not statement.target or not is_read:
            return replace(self, statements=tuple(rest))
        if not statement.stand_in:
            if statement.shape is None:
                return None
            argument = Input(statement.target, (self.inputs[0].shape[0], *statement.shape[1:]))
            return replace(self, inputs=(*self.inputs, argument), statements=tuple(rest))
        old, new = statement.target, statement.stand_in
        return replace(
            self,
            statements=tuple(other.with_name(old, new) for other in rest),
            outputs=tuple(dict.fromkeys(new if name == old else name for name in self.outputs)),
        )

    def text(self) -> str:
        """Python source with `Model`, `INPUTS` and `SETTINGS`; run as a script it prints what is wrong."""
        steps = [line for statement in self.statements for line in statement.lines]
        members = list(_needed(self.members, "\n".join(steps), r"\bself\.(\w+)"))
        helpers = list(_needed(self.helpers, "\n".join([*steps, *members]), r"\b(\w+)\b"))
        names = ", ".join(("self", *(value.name for value in self.inputs)))
        inputs = ", ".join(repr((value.shape, value.requires_grad)) for value in self.inputs)
        return "\n".join(
            [
                *_HEADER,
                *helpers,
                "",
                f"INPUTS = [{inputs}]",
                f"SETTINGS = {asdict(self.settings)!r}",
                "",
                "",
                "class Model(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(f"        {line}" for member in members for line in member.splitlines()),
                "",
                f"    def forward({names}):",
                *(f"        {line}" for line in steps),
                f"        return {', '.join(self.outputs)}",
                "",
            ]
        )


_HEADER = (
    "from __future__ import annotations",
    "",
    "import torch",
    "import torch.nn.functional as F",
    "from torch import nn",
    "from torch.utils.checkpoint import checkpoint",
    "",
)


def _needed(definitions: Mapping[str, str], text: str, mention: str) -> Iterator[str]:
    """The definitions that the text mentions, and those that they mention in turn, in their own order."""
    wanted: set[str] = set()
    unseen = text
    while unseen:
        found = set(re.findall(mention, unseen)) & definitions.keys() - wanted
        wanted |= found
        unseen = "\n".join(definitions[name] for name in found)
    return (definition for name, definition in definitions.items() if name in wanted)


def load(text: str, *, precision: torch.dtype | None = None) -> dict[str, Any]:
    """Runs the text of a program; given a precision, float32 or float64, all that it computes is computed in that."""
    if precision is not None:
        for old, new in _IN_ONE_PRECISION:
            text = re.sub(old, new.format(precision, "double" if precision is torch.float64 else "float"), text)
    name = f"fuse_pass_fuzz_{zlib.crc32(text.encode()):08x}.py"
    # Dynamo and the tracebacks of failures look source lines up there.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "fuse_pass_fuzz"}
    exec(compile(text, name, "exec"), namespace)
    return namespace


_IN_ONE_PRECISION = (
    (r'torch\.autocast\("cpu", torch\.bfloat16\)', 'torch.autocast("cpu", enabled=False)'),
    (r"torch\.(float64|float32|bfloat16|float16)\b", "{0}"),
    (r"\.(double|float|bfloat16|half)\(\)", ".{1}()"),
)


def script(text: str, level: str) -> str:
    """The text of a program as a script of its own that prints the differences it shows."""
    tail = (
        "",
        'if __name__ == "__main__":',
        "    from pathlib import Path",
        "",
        "    from fuse_pass.testing.compare import check",
        "",
        f'    print(check(Path(__file__).read_text(), "{level}"))',
        "",
    )
    return text + "\n".join(tail)
