"""Makes a failing program small: drops whatever it fails without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from fuse_pass.testing.program import Program, Settings


def shrink(program: Program, fails: Callable[[Program], bool], *, attempts: int = 200) -> Program:
    """The smallest failing program that dropping one part at a time leads to.

    Args:
        program: one that fails.
        fails: tells whether another one does too.
        attempts: how many programs to try at most.
    """
    smaller: Program | None = program
    while smaller is not None:
        program, smaller = smaller, None
        for candidate in _smaller(program):
            if attempts == 0:
                return program
            attempts -= 1
            if fails(candidate):
                smaller = candidate
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    if len(program.outputs) > 1:
        for name in program.outputs:
            yield replace(program, outputs=(name,))
    for statement in reversed(program.statements):
        shorter = program.without(statement)
        if shorter is not None:
            yield shorter
    for i, statement in enumerate(program.statements):  # end there
        if statement.target and i + 1 < len(program.statements):
            yield replace(program, statements=program.statements[: i + 1], outputs=(statement.target,))
    for argument in program.inputs[1:]:
        if not any(statement.mentions(argument.name) for statement in program.statements):
            yield replace(program, inputs=tuple(other for other in program.inputs if other is not argument))
    plain = Settings(seed=program.settings.seed)
    for name in ("budget", "rows", "fallback_random", "special", "dynamic", "autocast", "dtype", "grad", "training"):
        if getattr(program.settings, name) != getattr(plain, name):
            yield replace(program, settings=replace(program.settings, **{name: getattr(plain, name)}))
