"""A report as HTML that needs nothing else: a page with the model's modules as a tree, and tables for notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

from tabulate import tabulate

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { text-align: left; padding: .2rem .8rem .2rem 0; }
th { border-bottom: 1px solid #8888; } summary, .leaf { padding: .1rem 0; } details, .leaf { margin-left: 1.2rem; }
code { font: 13px ui-monospace, monospace; } .why { color: #888; font-size: 13px; }
.fused, .declined { border-radius: .6rem; padding: 0 .5rem; font-size: 13px; white-space: nowrap; }
.fused { background: #1a7f3733; } .declined { background: #bf870033; }
"""

Tables = Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]]


class Found(NamedTuple):
    """One place in the model.

    Attributes:
        where: the path of the module.
        is_fused: or declined.
        pattern: its name.
        details: in words.
    """

    where: str
    is_fused: bool
    pattern: str
    details: tuple[str, ...]


def page(summary: str, notes: Sequence[str], tables: Tables, found: Sequence[Found]) -> str:
    """A whole document, in UTF-8."""
    parts = ["<h1>fuse_pass</h1>", *_said(summary, notes), "<h2>The model</h2>", tree(found)]
    for title, (headers, rows) in tables.items():
        if rows:
            parts.append(f"<h2>{escape(title)}</h2>{tabulate(rows, headers=headers, tablefmt='html')}")
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>fuse_pass report</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def fragment(summary: str, notes: Sequence[str], tables: Tables) -> str:
    """What a notebook shows."""
    parts = _said(summary, notes)
    parts += [tabulate(rows, headers=headers, tablefmt="html") for headers, rows in tables.values() if rows]
    return "\n".join(parts)


def _said(summary: str, notes: Sequence[str]) -> list[str]:
    return [f"<p>{escape(text)}</p>" for text in (summary, *notes)]


@dataclass
class _Module:
    """A part of the model, with what was found in it and not in a part of its own."""

    parts: dict[str, _Module] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)

    def at(self, path: str) -> _Module:
        module = self
        for name in path.split(".") if path else ():
            module = module.parts.setdefault(name, _Module())
        return module

    def count(self, *, is_fused: bool) -> int:
        own = sum(one.is_fused is is_fused for one in self.found)
        return own + sum(part.count(is_fused=is_fused) for part in self.parts.values())


def tree(found: Sequence[Found]) -> str:
    """The modules in which something was found, nested as in the model."""
    root = _Module()
    for one in found:
        root.at(one.where).found.append(one)
    return "\n".join(_lines("model", root, is_open=True)) if found else "<p>Nothing was found.</p>"


def _lines(name: str, module: _Module, *, is_open: bool = False) -> Iterator[str]:
    counts = [(word, module.count(is_fused=word == "fused")) for word in ("fused", "declined")]
    badges = " ".join(_badge(word, f"{count} {word}") for word, count in counts if count)
    yield f"<details{' open' if is_open else ''}><summary><code>{escape(name)}</code> {badges}</summary>"
    for one in module.found:
        badge = _badge("fused" if one.is_fused else "declined", one.pattern)
        details = escape(" · ".join(filter(None, one.details)))
        yield f'<div class="leaf">{badge} <span class="why">{details}</span></div>'
    for key, part in module.parts.items():
        yield from _lines(key, part)
    yield "</details>"


def _badge(kind: str, text: str) -> str:
    return f'<span class="{kind}">{escape(text)}</span>'
