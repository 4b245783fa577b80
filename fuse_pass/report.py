"""What was fused and what was not, and why: data first, a table on demand."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from tabulate import tabulate

from fuse_pass import report_page
from fuse_pass.inductor import dynamo
from fuse_pass.report_groups import Group, grouped
from fuse_pass.report_page import Found


class Reason(StrEnum):
    """Why a candidate was left as it was."""

    SECOND_READER = "second reader"
    MUTATION = "mutation inside"
    AUTOCAST = "autocast switch inside"
    GRAD_MODE = "grad-mode switch inside"
    CONSTANTS = "mismatching constants"
    SUBCLASS = "tensor subclass"
    DTYPES = "different dtypes"
    DEVICES = "different devices"
    LAYOUT = "view changes the rows"
    BROADCAST = "dropout before a broadcast"
    FALLBACK_RANDOM = "fallback_random"
    FUNCTORCH = "inside a functorch transform"
    HIGHER_ORDER = "inside a higher-order op"
    ORDER = "inputs come too late"
    OVERLAP = "belongs to another match"
    NO_SECOND_LINEAR = "no Linear reads the activation"
    COST = "not worth it"
    OPAQUE = "hidden in one opaque call"
    QUANTIZATION = "quantised in between"
    NO_QUANTIZED_LAYER = "no quantised layer"
    EXCLUDED = "excluded"
    DYNAMIC_SCALE = "scale stays dynamic"
    SPLIT = "cut apart for DistributedDataParallel"
    OTHER_BACKEND = "compiled by another backend"
    SWITCHED_OFF = "compilation is switched off"
    RECOMPILE_LIMIT = "recompile limit"
    REUSED = "compiled before"
    GRAPH_BREAK = "graph break"
    NOT_COMPILED = "Inductor failed"
    NOT_CAPTURED = "not captured"


ADVICE: dict[Reason, str] = {
    Reason.SECOND_READER: "nothing, if the other reader needs the value; else remove the hook or the extra use",
    Reason.MUTATION: "write `x = x + y` instead of `x += y`, and drop `inplace=True`",
    Reason.AUTOCAST: "put the whole block under one autocast region",
    Reason.GRAD_MODE: "put the whole block under one grad mode",
    Reason.CONSTANTS: "check the constants: this is not quite the operation it looks like",
    Reason.SUBCLASS: "use plain tensors, or accept PyTorch's own kernels",
    Reason.DTYPES: "cast before the block, or run it under autocast",
    Reason.DEVICES: "move every tensor of the block to one device",
    Reason.LAYOUT: "reshape before the first or after the last operation of the block",
    Reason.BROADCAST: "expand the tensor before dropout",
    Reason.FALLBACK_RANDOM: "switch fallback_random and align_random_eager off",
    Reason.FUNCTORCH: "apply torch.func outside, or accept PyTorch's own kernels",
    Reason.HIGHER_ORDER: "move the block out of the higher-order op",
    Reason.ORDER: "compute the parameters of the norm before the sum is read",
    Reason.OVERLAP: "nothing: the other match has fused it",
    Reason.NO_SECOND_LINEAR: "nothing, unless another operation between the layers can be moved",
    Reason.COST: "nothing: PyTorch's own kernels are as fast here",
    Reason.OPAQUE: "compile with fuse_pass.compile",
    Reason.QUANTIZATION: "quantise inputs to a format without a scale, rounding to nearest",
    Reason.NO_QUANTIZED_LAYER: "use the `torch.nn` layer itself where a subclass is not needed",
    Reason.EXCLUDED: "nothing: the caller asked for it",
    Reason.DYNAMIC_SCALE: "nothing: the scale is taken from each tensor, as before calibration",
    Reason.SPLIT: "set torch._dynamo.config.optimize_ddp = False, or give DistributedDataParallel larger buckets",
    Reason.OTHER_BACKEND: 'compile the outer model with backend="fuse_pass", or call the inner one outside it',
    Reason.SWITCHED_OFF: "undo that setting while the model is called",
    Reason.RECOMPILE_LIMIT: "pass dynamic=True, call mark_dynamic on sizes that vary, or raise config.recompile_limit",
    Reason.REUSED: "open collect() before the first call, or call torch.compiler.reset() in between",
    Reason.NOT_CAPTURED: "trace with fuse_pass.fuse, torch.export.export or torch.compile",
    Reason.GRAPH_BREAK: "mend the break (fullgraph=True finds it), or use fuse_pass.convert",
    Reason.NOT_COMPILED: "FuseBackend(strict=True) raises the error: report it, to PyTorch or here",
}


@dataclass(frozen=True)
class Match:
    """One replaced occurrence.

    Attributes:
        pattern: name of the pattern.
        variant: what was found, e.g. `gelu, dropout 0.1`.
        where: module path in the model, e.g. `encoder.layer.0`; empty outside modules.
        source: file and line of the last operation, e.g. `modeling_bert.py:354`.
        node: name of the last graph node.
    """

    pattern: str
    variant: str
    where: str
    source: str
    node: str


@dataclass(frozen=True)
class Decline:
    """One candidate that was not replaced.

    Attributes:
        pattern: name of the pattern.
        reason: the named reason.
        detail: the reason in this case, in a sentence.
        where: module path in the model.
        source: file and line.
        node: name of the graph node that is the cause.
    """

    pattern: str
    reason: Reason
    detail: str
    where: str
    source: str
    node: str

    @property
    def advice(self) -> str:
        """What can be done about it."""
        return ADVICE[self.reason]


@dataclass(frozen=True)
class Note:
    """What no single node of a graph is the cause of.

    Attributes:
        reason: the named reason, for which there is advice.
        detail: the reason in this case, in a sentence.
    """

    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.detail} Advice: {ADVICE[self.reason]}."


@dataclass
class Report:
    """Matches and declines of one or several compiled graphs, and what kept others from being compiled so."""

    matches: list[Match] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)
    graphs: int = 0
    notes: list[Note] = field(default_factory=list)

    def counts(self) -> Counter[str]:
        """Number of matches per pattern; a pattern without a match is absent and reads as 0."""
        return Counter(match.pattern for match in self.matches)

    def extend(self, other: Report) -> None:
        self.matches += other.matches
        self.declines += other.declines
        self.graphs += other.graphs
        self.notes += [note for note in other.notes if note not in self.notes]

    def __str__(self) -> str:
        parts = [self.summary()]
        for title, (headers, rows) in self.tables().items():
            if rows:
                table = tabulate(rows, headers=headers)
                parts.append(f"Not fused:\n{table}" if title == "Not fused" else table)
        return "\n\n".join(parts + [str(note) for note in self.notes])

    def tables(self) -> dict[str, tuple[list[str], list[list[str]]]]:
        """Headers and rows of what was fused and what was not; layers that repeat share a row."""
        matches = [(match.where, (match.pattern, match.source, match.variant), ()) for match in self.matches]
        declines = [
            (decline.where, (decline.pattern, decline.source, str(decline.reason)), (decline.detail, decline.node))
            for decline in self.declines
        ]
        return {
            "Fused": _rows(("pattern", "source", "variant"), grouped(matches)),
            "Not fused": _rows(("pattern", "source", "node", "reason", "detail"), grouped(declines), (0, 1, 4, 2, 3)),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, as JSON can hold it; each decline with its advice."""
        return {
            "graphs": self.graphs,
            "matches": [asdict(match) for match in self.matches],
            "declines": [{**asdict(decline), "advice": decline.advice} for decline in self.declines],
            "notes": [{**asdict(note), "advice": ADVICE[note.reason]} for note in self.notes],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report: `.html`, a page that needs nothing else, or `.json`, what `to_dict` gives.

        Raises:
            ValueError: another ending.
        """
        ending = os.path.splitext(path)[1]
        if ending not in (".html", ".json"):
            raise ValueError(f"Report.save: expected a file ending in .html or .json, got {os.fspath(path)!r}")
        text = self._page() if ending == ".html" else json.dumps(self.to_dict(), indent=1)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def _page(self) -> str:
        found = [Found(match.where, True, match.pattern, (match.variant, match.source)) for match in self.matches]
        for decline in self.declines:
            details = (str(decline.reason), decline.detail, decline.advice, decline.source)
            found.append(Found(decline.where, False, decline.pattern, details))
        return report_page.page(self.summary(), list(map(str, self.notes)), self.tables(), found)

    def _repr_html_(self) -> str:
        """For notebooks."""
        return report_page.fragment(self.summary(), list(map(str, self.notes)), self.tables())

    def summary(self) -> str:
        """The numbers in a sentence."""
        if self.graphs == 0:
            if self.notes:
                return "No graph reached fuse_pass."
            return (
                "No graph reached fuse_pass: nothing was compiled, or Dynamo left the code to eager PyTorch "
                "(it does so with a whole function that calls nn.LSTM, nn.GRU or nn.RNN)."
            )
        fused = ", ".join(f"{count} × {name}" for name, count in sorted(self.counts().items())) or "nothing"
        return f"Fused {fused} in {self.graphs} graph{'' if self.graphs == 1 else 's'}; declined {len(self.declines)}."


def _rows(
    columns: tuple[str, ...], groups: list[Group], order: tuple[int, ...] = (0, 1, 2)
) -> tuple[list[str], list[list[str]]]:
    """With the path second, and how often where any row stands for several; `order` is that of the cells."""
    are_several = any(group.times > 1 for group in groups)
    pattern, *others = columns
    headers = [pattern, "where", *(["times"] if are_several else []), *others]
    rows: list[list[str]] = []
    for group in groups:
        first, *rest = (group.cells[place] for place in order)
        rows.append([first, group.where, *([str(group.times)] if are_several else []), *rest])
    return headers, rows


_COLLECTORS: ContextVar[tuple[Report, ...]] = ContextVar("fuse_pass_collectors", default=())
_EVER_PUBLISHED: list[bool] = []


@contextlib.contextmanager
def collect() -> Iterator[Report]:
    """Collects the reports of every graph that fuse_pass compiles in this thread while the context is open.

        with fuse_pass.collect() as report:
            fast(x)
        print(report)

    Compilation happens at the first call with new shapes; a call that reuses compiled code adds nothing. Where no graph
    came, or Dynamo left code alone, the report says why once the context is closed.
    """
    report = Report()
    token = _COLLECTORS.set((*_COLLECTORS.get(), report))
    try:
        with noting_what_is_left_out(report):
            yield report
    finally:
        _COLLECTORS.reset(token)


@contextlib.contextmanager
def noting_what_is_left_out(report: Report) -> Iterator[None]:
    """Adds notes to a report about code that ran in the context and that no graph in the report stands for."""
    before, switched_off = dynamo.progress(), dynamo.switched_off_by()
    yield
    steps = dynamo.progress().since(before)
    report.notes += _left_out(report.graphs, steps, switched_off or dynamo.switched_off_by())


def _left_out(graphs: int, steps: dynamo.Progress, switched_off: str | None) -> Iterator[Note]:
    if steps.left_alone:
        yield Note(Reason.SWITCHED_OFF, "A function behind torch.compiler.disable ran eagerly.")
    if steps.given_up:
        detail = "Dynamo has compiled a function as often as its recompile limit allows; it runs eagerly from there on."
        yield Note(Reason.RECOMPILE_LIMIT, detail)
    if graphs or steps.left_alone or steps.given_up:
        return
    if switched_off is not None:
        yield Note(Reason.SWITCHED_OFF, f"Nothing new is compiled under {switched_off}.")
    elif steps.graphs:
        count = f"{steps.graphs} graph{'' if steps.graphs == 1 else 's'}"
        detail = (
            f"Dynamo captured {count} for another backend; an outer torch.compile takes in what fuse_pass compiled."
        )
        yield Note(Reason.OTHER_BACKEND, detail)
    elif _EVER_PUBLISHED:
        yield Note(
            Reason.REUSED,
            "Nothing was compiled here: calls reuse what was compiled before, or no code may be compiled.",
        )


def publish(report: Report) -> None:
    """Hands the report of one graph to every open `collect()`."""
    _EVER_PUBLISHED[:] = [True]
    for collector in _COLLECTORS.get():
        collector.extend(report)
