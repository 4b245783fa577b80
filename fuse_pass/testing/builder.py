"""Writes a random program statement by statement, and knows the shape and dtype of every value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from fuse_pass.testing.program import Input, Program, Settings, Statement
from fuse_pass.testing.sources import ROWS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A tensor in `forward`.

    Attributes:
        name: of the variable.
        shape: as it is for a batch of three, which may be another at run time.
        base: whether it has the dtype of parameters and inputs.
    """

    name: str
    shape: Shape
    base: bool = True

    @property
    def width(self) -> int:
        return self.shape[-1]


_WRAPPERS = (
    ("with torch.no_grad():",),
    ("with torch.enable_grad():",),
    ('with torch.autocast("cpu", torch.bfloat16):',),
    ('with torch.autocast("cpu", torch.bfloat16):', "with torch.no_grad():"),
)

HOOKS = {
    "hook": "def hook(module, arguments, output):\n    return output * 1.5\n",
    "pre_hook": "def pre_hook(module, arguments):\n    return (torch.tanh(arguments[0]),)\n",
}


class Builder:
    """The program so far.

    Args:
        random: source of all choices.
        inputs: shapes of the arguments of `forward`.
        distract: called between the steps of a pattern.
        wrap: probability that a statement runs in a context of its own.

    Attributes:
        fallback_random: whether the program is to be run with eager's random numbers.
    """

    def __init__(
        self, random: Random, inputs: Sequence[Shape], distract: Callable[[Builder], None], wrap: float = 0.04
    ) -> None:
        self.random = random
        self.values = [Value(f"x{i}", shape) for i, shape in enumerate(inputs)]
        self.statements: list[Statement] = []
        self.members: dict[str, str] = {}
        self.helpers: dict[str, str] = dict(HOOKS)
        self._inputs = tuple(Input(value.name, value.shape, random.random() < 0.85) for value in self.values)
        self._distract, self._wrap = distract, wrap
        self._linears: list[tuple[str, int, int]] = []
        self._fresh = 0
        self.fallback_random = False

    def name(self, prefix: str) -> str:
        self._fresh += 1
        return f"{prefix}{self._fresh}"

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one_of(self, *choices: str) -> str:
        return self.random.choice(choices)

    def emit(self, expression: str, shape: Shape, *, like: Value | None = None, base: bool = True) -> Value:
        """`v = expression`; `like` is a value that may stand in for it when the program is shrunk."""
        value = Value(self.name("v"), shape, base)
        self.statements.append(
            Statement(
                value.name,
                self._in_context(value.name, expression, base),
                _stand_in(value, like),
                shape if base and shape[:1] == ROWS[:1] else None,
            )
        )
        self.values.append(value)
        return value

    def emit_block(self, lines: Sequence[str], result: str, shape: Shape) -> Value:
        """Several lines that belong together, whose `result` becomes one value."""
        value = Value(self.name("v"), shape)
        self.statements.append(Statement(value.name, (*lines, f"{value.name} = {result}"), shape=shape))
        self.values.append(value)
        return value

    def do(self, line: str) -> None:
        """A line that defines nothing."""
        self.statements.append(Statement("", (line,)))

    def _in_context(self, target: str, expression: str, base: bool) -> tuple[str, ...]:
        line = f"{target} = {expression}"
        if not self.chance(self._wrap):
            return (line,)
        wrappers = self.random.choice(_WRAPPERS)
        lines = [f"{'    ' * depth}{wrapper}" for depth, wrapper in enumerate(wrappers)]
        indent = "    " * len(wrappers)
        lines.append(indent + line)
        if base and any("autocast" in wrapper for wrapper in wrappers):
            lines.append(f"{indent if self.chance(0.3) else ''}{target} = {target}.to(x0.dtype)")
        return tuple(lines)

    def pick(self, width: int | None = None) -> Value:
        """An earlier value `[*ROWS, width]` of the base dtype; the later, the likelier."""
        known = [
            value
            for value in self.values
            if value.base and value.shape[:-1] == ROWS and (width is None or value.width == width)
        ]
        if not known:
            return self.fit(self.values[0], (*ROWS, width or 8))
        return known[-1] if self.chance(0.6) else self.random.choice(known)

    def fit(self, value: Value, shape: Shape) -> Value:
        """A value `[*ROWS, ...]` made from another by what it takes: casts, views, a Linear."""
        if not value.base:
            value = self.emit(f"{value.name}.to(x0.dtype)", value.shape)
        if value.shape == shape:
            return value
        width = 1
        for size in shape[len(ROWS) :]:
            width *= size
        if value.shape[: len(ROWS)] != ROWS or len(value.shape) != len(ROWS) + 1:
            size = 1
            for part in value.shape:
                size *= part
            if size % ROWS[1]:
                return self.fit(self.values[0], shape)
            inner = size // (ROWS[0] * ROWS[1])
            value = self.emit(f"{value.name}.reshape(-1, {ROWS[1]}, {inner})", (*ROWS, inner))
        if value.width != width:
            value = self.emit(f"{self.linear(value.width, width)}({value.name})", (*ROWS, width))
        if len(shape) != len(ROWS) + 1:
            rest = ", ".join(str(size) for size in shape[1:])
            value = self.emit(f"{value.name}.reshape(-1, {rest})", shape)
        return value

    def linear(self, d_in: int, d_out: int) -> str:
        """A Linear module, sometimes one that is used already, frozen, without bias, or with a hook."""
        if self.chance(0.12):
            for name, known_in, known_out in self._linears:
                if (known_in, known_out) == (d_in, d_out):
                    return f"self.{name}"
        name = self.name("linear")
        bias = ", bias=False" if self.chance(0.2) else ""
        frozen = ".requires_grad_(False)" if self.chance(0.12) else ""
        text = f"self.{name} = nn.Linear({d_in}, {d_out}{bias}){frozen}"
        if self.chance(0.06):
            text += f"\nself.{name}.register_forward_hook(hook)"
        elif self.chance(0.04):
            text += f"\nself.{name}.register_forward_pre_hook(pre_hook)"
        elif self._linears and self.chance(0.08):
            other, other_in, other_out = self.random.choice(self._linears)
            if (other_in, other_out) == (d_in, d_out):
                text += f"\nself.{name}.weight = self.{other}.weight"
        self.members[name] = text
        self._linears.append((name, d_in, d_out))
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        name = self.name("w")
        frozen = ", requires_grad=False" if self.chance(0.12) else ""
        sizes = ", ".join(str(size) for size in shape)
        self.members[name] = f"self.{name} = nn.Parameter(torch.empty({sizes}){frozen})"
        return f"self.{name}"

    def module(self, prefix: str, constructor: str) -> str:
        name = self.name(prefix)
        self.members[name] = f"self.{name} = {constructor}"
        return f"self.{name}"

    def distract(self, probability: float = 0.15) -> None:
        if self.chance(probability):
            self._distract(self)

    def program(self, settings: Settings, batch: int) -> Program:
        """The finished program; it returns the last value, and sometimes others."""
        results = [value for value in self.values if self.statements and value.name.startswith("v")] or self.values
        outputs = [results[-1].name]
        while self.chance(0.3):
            outputs.append(self.random.choice(self.values).name)
        inputs = tuple(Input(value.name, (batch, *value.shape[1:]), value.requires_grad) for value in self._inputs)
        return Program(
            inputs, tuple(self.statements), tuple(dict.fromkeys(outputs)), self.members, self.helpers, settings
        )


def _stand_in(value: Value, like: Value | None) -> str:
    if like is None or (like.shape, like.base) != (value.shape, value.base):
        return ""
    return like.name
