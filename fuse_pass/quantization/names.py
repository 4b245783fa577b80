"""Which layers of a model are meant: patterns of their names, as `include` and `exclude` of `convert` and `pack`."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

Names = str | Iterable[str]


class NameFilter:
    """Layers whose names match a pattern of `include`, or all, but for those that match one of `exclude`.

    Args:
        caller: for messages.
        include: patterns as `fnmatch` has them; None for all.
        exclude: likewise; None for none.

    Raises:
        TypeError: something else than patterns.
    """

    def __init__(self, caller: str, include: Names | None, exclude: Names | None) -> None:
        self._caller = caller
        self._include = None if include is None else self._patterns("include", include)
        self._exclude = () if exclude is None else self._patterns("exclude", exclude)

    def allows(self, name: str) -> bool:
        included = self._include is None or any(fnmatchcase(name, pattern) for pattern in self._include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self._exclude)

    def require_names_of(self, model: nn.Module, more: Iterable[str] = ()) -> None:
        """A pattern without any layer is a misspelt name.

        Args:
            model: whose layers are named.
            more: further patterns that must match something.

        Raises:
            ValueError: there is one.
        """
        names = [name for name, _ in model.named_modules()]
        for pattern in (*(self._include or ()), *self._exclude, *more):
            if not any(fnmatchcase(name, pattern) for name in names):
                examples = ", ".join(repr(name) for name in names[1:4]) or "''"
                raise ValueError(f"{self._caller}: no module's name matches {pattern!r}; names look like {examples}")

    def _patterns(self, what: str, names: Names) -> tuple[str, ...]:
        patterns = (names,) if isinstance(names, str) else tuple(names)
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{self._caller}: {what}: expected names or patterns, got {pattern!r}")
        return patterns
