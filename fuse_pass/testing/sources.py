"""The patterns' own spellings as source text, to be planted in random models."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuse_pass.patterns import PATTERNS, Pattern

ROWS = (3, 5)


@dataclass(frozen=True)
class Spelling:
    """A pattern written one way.

    Attributes:
        pattern: name of the pattern.
        name: name of the spelling.
        factory: body of a function that returns it.
        values: names and shapes of the arguments that hold activations; the first sizes are `ROWS`.
        parameters: names and shapes of the arguments that hold weights.
        arguments: names of all arguments in order; those in neither of the above are None.
        results: shapes of the results.
        dtypes: of the results, for float32 arguments.
        several: whether it returns a tuple.
    """

    pattern: str
    name: str
    factory: str
    values: dict[str, tuple[int, ...]]
    parameters: dict[str, tuple[int, ...]]
    arguments: tuple[str, ...]
    results: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    several: bool


@functools.cache
def spellings() -> tuple[Spelling, ...]:
    """Every spelling of every pattern that takes three-dimensional activations."""
    return tuple(
        spelling
        for pattern in PATTERNS
        for name, function in pattern.corpus.spellings.items()
        if (spelling := _described(pattern, name, function)) is not None
    )


def _described(pattern: Pattern[Any], name: str, function: Callable[..., Any]) -> Spelling | None:
    inputs = pattern.corpus.example_inputs(rows=ROWS)
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    if any(value is not None and key not in tensors for key, value in inputs.items()):
        return None
    with torch.no_grad():
        found = function(*inputs.values())
    results = found if isinstance(found, tuple) else (found,)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    return Spelling(
        pattern=pattern.name,
        name=name,
        factory=textwrap.indent(_factory(pattern, function, name), "    "),
        values={key: shape for key, shape in shapes.items() if shape[: len(ROWS)] == ROWS},
        parameters={key: shape for key, shape in shapes.items() if shape[: len(ROWS)] != ROWS},
        arguments=tuple(inputs),
        results=tuple(tuple(result.shape) for result in results),
        dtypes=tuple(result.dtype for result in results),
        several=isinstance(found, tuple),
    )


def _factory(pattern: Pattern[Any], function: Callable[..., Any], name: str) -> str:
    """The body of a function that returns the spelling, with all that its text refers to."""
    # A spelling that is a function of PyTorch stands in the corpus's own module.
    ours = function if function.__module__.startswith("fuse_pass.") else pattern.corpus.reference
    source = inspect.getsource(sys.modules[ours.__module__])
    tree = ast.parse(source)
    expression = _entry(tree, name)
    if expression is None:
        return (
            "from fuse_pass.patterns import PATTERNS\n"
            f"return next(p for p in PATTERNS if p.name == {pattern.name!r}).corpus.spellings[{name!r}]"
        )
    definitions = {defined: statement for statement in tree.body for defined in _defined_by(statement)}
    needed = sorted(_needed(expression, definitions), key=lambda statement: statement.lineno)
    lines = [_text(source, statement) for statement in needed]
    lines.append(f"return (\n{ast.get_source_segment(source, expression)}\n)")
    return "\n".join(lines)


def _entry(tree: ast.Module, name: str) -> ast.expr | None:
    """What stands behind the name in a dictionary of the module; None where it is not written out there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name:
                    return value
    return None


def _defined_by(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.split(".")[0] for alias in statement.names)
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))


def _needed(node: ast.AST, definitions: dict[str, ast.stmt]) -> set[ast.stmt]:
    needed: set[ast.stmt] = set()
    unseen: list[ast.AST] = [node]
    while unseen:
        for inner in ast.walk(unseen.pop()):
            statement = definitions.get(inner.id) if isinstance(inner, ast.Name) else None
            if statement is not None and statement not in needed:
                needed.add(statement)
                unseen.append(statement)
    return needed


def _text(source: str, statement: ast.stmt) -> str:
    text = ast.get_source_segment(source, statement)
    assert text is not None
    return text
