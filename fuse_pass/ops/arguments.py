"""The arguments of an op as the fields of a frozen dataclass, and the schema that follows from them."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, NamedTuple, Self

import torch
from torch import Tensor


class Role(enum.Enum):
    """What an argument is for, beside its type."""

    WEIGHT = "a weight `[d_out, d_in]`, of which a packed copy may be kept"
    SEED = "what random numbers are computed from"
    SIZE = "a size, which may be known at run time only"


Weight = Annotated[Tensor, Role.WEIGHT]
Seed = Annotated[Tensor, Role.SEED]
Size = Annotated[int, Role.SIZE]

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    Sequence[int]: "int[]",
    Sequence[float]: "float[]",
}


class Argument(NamedTuple):
    """One argument of an op as its schema has it."""

    name: str
    type: str
    role: Role | None
    default: Any

    def __str__(self) -> str:
        if self.default is MISSING:
            return f"{self.type} {self.name}"
        default = list(self.default) if isinstance(self.default, tuple) else self.default
        return f"{self.type} {self.name}=" + (f'"{default}"' if isinstance(default, str) else str(default))


@dataclass(frozen=True)
class Arguments:
    """What `FusedOp` and `Gradients` have in common: arguments in the order of the fields."""

    @classmethod
    def of_call(cls, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Self:
        """Those of a call, whether of tensors or of nodes in a graph; what is not given has its default."""
        given, kwargs = len(args), kwargs or {}
        rest = (kwargs.get(argument.name, argument.default) for argument in arguments_of(cls)[given:])
        built: Self = _built(cls, iter((*args, *rest)))
        return built

    def arguments(self) -> list[Any]:
        """Those of a call, in order."""
        return list(_values(self))

    def given(self) -> list[Any]:
        """The same without what is left at its default at the end."""
        values = self.arguments()
        for argument in reversed(arguments_of(type(self))):
            default = argument.default
            if default is MISSING or (tuple(values[-1]) if isinstance(default, tuple) else values[-1]) != default:
                break
            values.pop()
        return values

    def named(self) -> dict[str, Any]:
        """Those of a call by their names in the schema."""
        names = (argument.name for argument in arguments_of(type(self)))
        return dict(zip(names, _values(self), strict=True))

    def replaced(self, new: Mapping[str, Any]) -> Self:
        """The same with other values of some arguments."""
        return self.of_call((), {**self.named(), **new})

    def of_role(self, role: Role) -> list[Any]:
        """The values of the arguments with a role that are not None."""
        arguments = arguments_of(type(self))
        values = zip(arguments, _values(self), strict=True)
        return [value for argument, value in values if argument.role is role and value is not None]


def arguments_of(kind: type[Arguments]) -> tuple[Argument, ...]:
    """The arguments that a declaration stands for, in the order of its schema."""
    return _flat(kind).arguments


class _Field(NamedTuple):
    """A field of a declaration: an argument, or a part with arguments of its own."""

    name: str
    argument: Argument | None
    part: Any


class _Flat(NamedTuple):
    fields: tuple[_Field, ...]
    arguments: tuple[Argument, ...]


_FLAT: dict[type, _Flat] = {}


def _flat(kind: type) -> _Flat:
    if kind not in _FLAT:
        fields = tuple(_fields_of(kind))
        arguments = ((field.argument,) if field.argument else _flat(field.part).arguments for field in fields)
        _FLAT[kind] = _Flat(fields, tuple(itertools.chain.from_iterable(arguments)))
    return _FLAT[kind]


def _fields_of(kind: Any) -> Iterator[_Field]:
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        # What a declaration inherits that is no field: a dataclass would take it for the default.
        if any(field.name in vars(base) and not _is_field(base, field.name) for base in kind.__mro__[1:]):
            raise TypeError(f"{kind.__name__}.{field.name}: all declarations have an attribute of this name")
        hint = hints[field.name]
        is_part = dataclasses.is_dataclass(hint)
        yield _Field(field.name, None if is_part else _argument(field, hint), hint if is_part else None)


def _is_field(base: type, name: str) -> bool:
    return name in getattr(base, "__dataclass_fields__", {}) and name in base.__annotations__


def _argument(field: dataclasses.Field[Any], annotation: Any) -> Argument:
    choices = [choice for choice in typing.get_args(annotation) if choice is not type(None)]
    is_optional = type(None) in typing.get_args(annotation)
    plain = choices[0] if is_optional else annotation
    plain, role = typing.get_args(plain) if typing.get_origin(plain) is Annotated else (plain, None)
    if plain not in _SCHEMA_TYPES:
        known = ", ".join(sorted(str(getattr(kind, "__name__", kind)) for kind in _SCHEMA_TYPES))
        raise TypeError(f"{field.name}: expected one of {known} or a dataclass of them, got {plain}")
    name = "SymInt" if role is Role.SIZE else _SCHEMA_TYPES[plain]
    return Argument(field.name, name + ("?" if is_optional else ""), role, field.default)


def _built(kind: Any, values: Iterator[Any]) -> Any:
    return kind(*(_built(field.part, values) if field.part else next(values) for field in _flat(kind).fields))


def _values(arguments: Any) -> Iterator[Any]:
    for field in _flat(type(arguments)).fields:
        value = getattr(arguments, field.name)
        if field.part:
            yield from _values(value)
        else:
            yield value
