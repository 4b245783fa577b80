"""PyTorch's private names are used in one room, and where else they are is listed here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fuse_pass

PACKAGE = Path(fuse_pass.__file__).parent
ROOM = PACKAGE / "inductor"
# Private by PyTorch's own word, though nothing in the name says so.
PRIVATE_MODULES = ("torch.fx.experimental", "torch.ops.prims")
# Outside of the room: file and name, with the reason.
ELSEWHERE: dict[tuple[str, str], str] = {}

_UNDERSCORED = re.compile(r"_(?!_)")


def is_private(path: str) -> bool:
    """Whether a dotted name of PyTorch is: a part begins with one underscore, or it lies in a private module."""
    return any(map(_UNDERSCORED.match, path.split("."))) or any(
        path == module or path.startswith(f"{module}.") for module in PRIVATE_MODULES
    )


def private_names(source: str) -> set[str]:
    """The private names of PyTorch that a file uses.

    They are: what it imports from torch, or reaches from a name that stands for a part of torch, by a private dotted
    name; any attribute `x._y` of another object that neither the file nor a class of ours defines; and such a `_y` as
    the text that `getattr`, `hasattr` and `setattr` are given, or as a key of `meta`.
    """
    tree = ast.parse(source)
    aliases = dict(_aliases(tree))
    own = {*_own_names(tree), *OUR_FIELDS}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {path for _, path in _imported(node) if path.split(".")[0] == "torch" and is_private(path)}
        elif isinstance(node, ast.Attribute):
            path = _dotted(node, aliases)
            if path is not None and path.split(".")[0] == "torch":
                found |= {path} if is_private(path) else set()
            elif _UNDERSCORED.match(node.attr) and node.attr not in own and not _is_self(node.value):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and _dotted(node.func, {}) in ("getattr", "hasattr", "setattr"):
            found |= {text for text in map(_text, node.args[1:2]) if _UNDERSCORED.match(text) and text not in own}
        elif isinstance(node, ast.Compare) and any(_is_meta(part) for part in node.comparators):
            found |= {text for text in (_text(node.left),) if _UNDERSCORED.match(text)}
        elif isinstance(node, ast.Subscript) and _is_meta(node.value):
            found |= {text for text in (_text(node.slice),) if _UNDERSCORED.match(text)}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """The names that an import binds, with what they stand for."""
    for name in node.names:
        if isinstance(node, ast.ImportFrom):
            yield name.asname or name.name, f"{node.module}.{name.name}"
        else:
            yield (name.asname, name.name) if name.asname else (name.name.split(".")[0], name.name.split(".")[0])
            if not name.asname:
                yield "", name.name


def _aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names that stand for parts of modules: imports, and `aten = torch.ops.aten` at the top of a file."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= {name: path for name, path in _imported(node) if name}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                for name, value in zip(names, values, strict=False):
                    path = _dotted(value, known)
                    if isinstance(name, ast.Name) and path is not None:
                        known[name.id] = path
    yield from known.items()


def _own_names(tree: ast.Module) -> Iterator[str]:
    """What a file defines: functions, classes, fields, and what it sets on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """`a.b.c` as text, its first name replaced by what it stands for."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, aliases)
        return None if base is None else f"{base}.{node.attr}"
    return None


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_meta(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "meta"


def _text(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


OUR_FIELDS = frozenset(
    field.target.id
    for path in PACKAGE.rglob("*.py")
    for kind in ast.walk(ast.parse(path.read_text()))
    if isinstance(kind, ast.ClassDef)
    for field in kind.body
    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
)
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if ROOM not in path.parents]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_private_names_are_in_one_room(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    listed = {what for file, what in ELSEWHERE if file == name}
    found = private_names(path.read_text())
    assert found <= listed, f"{name} uses {sorted(found - listed)}: name it in fuse_pass/inductor/private.py"
    assert listed <= found, f"{name} no longer uses {sorted(listed - found)}: take it off the list"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch._C._functorch.get_unwrapped(x)", {"torch._C._functorch.get_unwrapped"}),
        ("import torch\nx: torch._ops.OpOverload", {"torch._ops.OpOverload"}),
        ("from torch._dynamo.utils import counters", {"torch._dynamo.utils.counters"}),
        ("import torch._inductor.config as config", {"torch._inductor.config"}),
        ("from torch.fx.experimental.proxy_tensor import make_fx", {"torch.fx.experimental.proxy_tensor.make_fx"}),
        ("import torch\naten = torch.ops.aten\naten._unsafe_view(x)", {"torch.ops.aten._unsafe_view"}),
        ("import torch\naten, prims = torch.ops.aten, torch.ops.prims\nprims.iota", {"torch.ops.prims.iota"}),
        ("op._schema.is_mutable", {"_schema"}),
        ("f(x)._cdata", {"_cdata"}),
        ("hasattr(x, '_dynamo_source')", {"_dynamo_source"}),
        ("'_policy' in body.meta", {"_policy"}),
        ("body.meta['_policy']", {"_policy"}),
        ("import torch\ntorch.__version__\ntorch.ops.aten.mm", set()),
        ("class A:\n  def f(self):\n    self._x = 1\n    return other._x + self._y", set()),
        ("_x = 1\nprint(_x)\nhasattr(x, 'y')", set()),
    ],
)
def test_what_is_private(source: str, expected: set[str]) -> None:
    assert private_names(source) == expected
