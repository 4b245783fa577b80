"""What a pattern is, and how any pattern is applied to a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import Graph, Node

from fuse_pass.graph.canonical import Operations
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.safety import Problem, find_problem
from fuse_pass.graph.shapes import value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.report import Decline, Match, Reason, Report


@dataclass(frozen=True)
class Situation:
    """What surrounds a graph and decides what is allowed in it.

    Attributes:
        own_random_numbers: False where the user asked for eager's random numbers.
        body_of: name of the higher-order op whose body the graph is, if our ops are not known to be safe in it.
        autocast: arguments of the autocast regions in which that body is called, outermost first.
    """

    own_random_numbers: bool = True
    body_of: str | None = None
    autocast: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One place in a graph that looks like the pattern.

    Attributes:
        anchor: the last node.
        nodes: every node that a replacement removes.
        outputs: those of them whose values the replacement provides (the anchor first).
        inputs: the tensors that it reads, by name; None where the spelling has none.
        constants: everything else that it takes from the match.
        variant: a few words for the report.
        needs_random_numbers: whether it draws a dropout mask.
        problem: what the search itself found to be wrong.
    """

    anchor: Node
    nodes: frozenset[Node]
    outputs: tuple[Node, ...]
    inputs: Mapping[str, Node | None]
    constants: Mapping[str, Any]
    variant: str
    needs_random_numbers: bool = False
    problem: Problem | None = None


@dataclass(frozen=True)
class Pattern:
    """One fusion, declared in a room of its own.

    Attributes:
        name: public name.
        find: yields candidates, near misses included, in graph order; told the nodes of the matches accepted so far.
        check: what else must hold, beyond `find_problem`.
        replace: puts one fused op in place of a candidate.
        reference: the same mathematics in eager PyTorch, for tests.
        spellings: functions with the arguments of `reference` that must all be found.
        example_inputs: arguments for `reference`; no two sizes are equal.
    """

    name: str
    find: Callable[[GraphView, Set[Node]], Iterator[Candidate]]
    check: Callable[[GraphView, Candidate], Problem | None]
    replace: Callable[[Editor, Candidate], None]
    reference: Callable[..., Any]
    spellings: Mapping[str, Callable[..., Any]]
    example_inputs: Callable[..., dict[str, Any]] = field(repr=False)


def hidden_in_encoder_layers(view: GraphView) -> Iterator[Candidate]:
    """PyTorch's fast path runs a whole `nn.TransformerEncoderLayer` in one call; its patterns are near misses."""
    for node in view.nodes:
        if view.kind(node) == "encoder_layer":
            detail = "nn.TransformerEncoderLayer runs as one call; fuse_pass.compile switches this fast path off"
            problem = Problem(Reason.OPAQUE, detail, node)
            yield Candidate(node, frozenset((node,)), (), {}, {}, "encoder layer", problem=problem)


def apply(pattern: Pattern, graph: Graph, situation: Situation, operations: Operations | None = None) -> Report:
    """Replaces every safe occurrence of a pattern in one graph, in place; near misses are declined with a reason."""
    view = GraphView(graph, situation.autocast, operations)
    report = Report()
    accepted: list[Candidate] = []
    taken: set[Node] = set()
    for candidate in pattern.find(view, taken):
        problem = _problem(pattern, view, candidate, situation, taken)
        if problem is None:
            accepted.append(candidate)
            taken |= candidate.nodes
            report.matches.append(_match(pattern, candidate))
        else:
            report.declines.append(decline_of(pattern.name, candidate.nodes, candidate.anchor, problem))
    editor = Editor(view)
    for candidate in accepted:
        pattern.replace(editor, candidate)
    return report


def _problem(
    pattern: Pattern, view: GraphView, candidate: Candidate, situation: Situation, taken: set[Node]
) -> Problem | None:
    if candidate.problem is not None:
        return candidate.problem
    for node in candidate.nodes & taken:
        return Problem(Reason.OVERLAP, f"{node.name} is already fused", node)
    if situation.body_of is not None:
        return Problem(Reason.HIGHER_ORDER, f"the body of {situation.body_of} is left alone", candidate.anchor)
    if candidate.needs_random_numbers and not situation.own_random_numbers:
        detail = "fallback_random or align_random_eager asks for eager's random numbers"
        return Problem(Reason.FALLBACK_RANDOM, detail, candidate.anchor)
    inputs = [node for node in candidate.inputs.values() if node is not None]
    scalars = [value for value in candidate.constants.values() if isinstance(value, Node) and value_of(value) is None]
    return find_problem(view, candidate.nodes, candidate.outputs, inputs, scalars) or pattern.check(view, candidate)


def _match(pattern: Pattern, candidate: Candidate) -> Match:
    return Match(
        pattern.name,
        candidate.variant,
        module_path(candidate.nodes),
        source_line(candidate.anchor),
        candidate.anchor.name,
    )


def decline_of(pattern: str, nodes: frozenset[Node], anchor: Node, problem: Problem) -> Decline:
    return Decline(
        pattern,
        problem.reason,
        problem.detail,
        module_path(nodes),
        source_line(problem.node) or source_line(anchor),
        problem.node.name,
    )


def module_path(nodes: frozenset[Node]) -> str:
    """The innermost module that contains all nodes, as in `named_modules()`."""
    paths = [_path_of(node) for node in nodes]
    known = [path for path in paths if path is not None]
    if not known:
        return ""
    common = []
    for parts in zip(*known, strict=False):
        if len(set(parts)) != 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _path_of(node: Node) -> list[str] | None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, _ = list(stack.values())[-1]
    path = re.sub(r"^[LG]\['[^']*'\]", "", path)  # the variable that held the model
    path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)
    return [part for part in path.split(".") if part and part not in ("_modules", "_orig_mod")]


_PACKAGE = str(Path(__file__).resolve().parents[1])


def source_line(node: Node) -> str:
    """`file.py:12` of the line that the node came from; empty where Dynamo recorded none."""
    frames = re.findall(r'File "([^"]*)", line (\d+)', node.meta.get("stack_trace") or "")
    frames = [(path, line) for path, line in frames if not path.startswith(_PACKAGE)]
    if not frames:
        return ""
    path, line = frames[-1]
    return f"{path.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line}"
