"""What a pattern is, and how any pattern is applied to a graph.

A pattern looks for matches (`find`), says what else must hold (`check`), and puts the call of one op in the place of a
match (`replace`). A match holds that call already, as the declaration of the op with nodes of the graph in the place of
tensors. What all patterns have in common is here: what is safe, which op it is, where its random numbers come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fuse_pass.gemm.problem import GemmProblem
from fuse_pass.gemm.product import pays
from fuse_pass.graph.canonical import Operations
from fuse_pass.graph.edit import Editor
from fuse_pass.graph.safety import Problem, find_problem
from fuse_pass.graph.shapes import value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.ops.fused_op import FusedOp, operator_of
from fuse_pass.patterns.spellings import Corpus
from fuse_pass.report import Decline, Match, Reason, Report


@dataclass(frozen=True)
class Situation:
    """What surrounds a graph and decides what is allowed in it.

    Attributes:
        own_random_numbers: False where the user asked for eager's random numbers.
        body_of: name of the higher-order op whose body the graph is, if our ops are not known to be safe in it.
        autocast: arguments of the autocast regions in which that body is called, outermost first.
        kept_input: name of an input that is written to and may be kept for backward all the same; empty if there is
            none.
        pays: the cost model: whether anything is faster at a product than PyTorch's own choice.
    """

    own_random_numbers: bool = True
    body_of: str | None = None
    autocast: tuple[tuple[Any, ...], ...] = ()
    kept_input: str = ""
    pays: Callable[[GemmProblem], bool] = pays


Call = TypeVar("Call", bound=FusedOp)


@dataclass(frozen=True, kw_only=True)
class Candidate(Generic[Call]):
    """A match: one place in a graph where an op of ours may stand.

    Attributes:
        anchor: the last node.
        nodes: every node that a replacement removes.
        outputs: those of them whose values the replacement provides (the anchor first).
        call: the op with nodes in the place of tensors, and of numbers that the graph computes; its seed is drawn when
            it is inserted, its weights are as the graph has them.
        variant: a few words for the report.
        draws: whether it draws a dropout mask.
        parts: nodes from which an argument is yet to be made, which the call lacks.
    """

    anchor: Node
    nodes: frozenset[Node]
    outputs: tuple[Node, ...]
    call: Call
    variant: str
    draws: bool = False
    parts: tuple[Node, ...] = ()


@dataclass(frozen=True)
class NearMiss:
    """A place that looks like the pattern, and what the search itself found to be wrong there."""

    anchor: Node
    nodes: frozenset[Node]
    problem: Problem


Found = TypeVar("Found", bound=Candidate[Any])


@dataclass(frozen=True)
class Pattern(Generic[Found]):
    """One fusion, declared in a room of its own.

    Attributes:
        name: public name.
        find: yields matches and near misses in graph order; told the nodes of the matches accepted so far, and what
            surrounds the graph.
        check: what else must hold, beyond `find_problem`.
        replace: puts one fused op in place of a match.
        corpus: the pattern as models write it.
    """

    name: str
    find: Callable[[GraphView, Set[Node], Situation], Iterator[Found | NearMiss]]
    check: Callable[[GraphView, Found], Problem | None]
    replace: Callable[[Editor, Found], None]
    corpus: Corpus = field(repr=False)


def tensor(node: Node | None) -> Any:
    """A node in the place of the tensor that it computes, where the declaration of an op wants one."""
    return node


def node_of(value: Tensor | None) -> Any:
    """The node that stands in the place of a tensor in the call of a match."""
    return value


def drops(p: Any) -> bool:
    """Whether a dropout does anything; one whose p is known at run time only may."""
    return bool(p) if isinstance(p, (int, float)) else True


def insert(editor: Editor, call: FusedOp, *, draws: bool, like: Tensor, results: int = 1) -> list[Node]:
    """Adds the call of an op where the editor stands: for training or inference, with a seed of its own.

    Args:
        editor: writes the graph.
        call: the op with nodes in the place of tensors.
        draws: whether it needs a seed.
        like: the value that it replaces.
        results: how many of its results are wanted.
    """
    if draws:
        seed = editor.call_ours(torch.ops.fuse_pass.seed.default, device=like.device)
        call = call.replaced({"seed": seed})
    op = operator_of(type(call), inference=not like.requires_grad)
    node = editor.call_ours(op, *call.given())
    is_one = not isinstance(node.meta["example_value"], (tuple, list))
    return [node] if is_one else [editor.item(node, i) for i in range(results)]


def hidden_in_encoder_layers(view: GraphView) -> Iterator[NearMiss]:
    """PyTorch's fast path runs a whole `nn.TransformerEncoderLayer` in one call; its patterns are near misses."""
    for node in view.nodes:
        if view.kind(node) == "encoder_layer":
            detail = "nn.TransformerEncoderLayer runs as one call; fuse_pass.compile switches this fast path off"
            yield NearMiss(node, frozenset((node,)), Problem(Reason.OPAQUE, detail, node))


def apply(pattern: Pattern[Any], graph: Graph, situation: Situation, operations: Operations | None = None) -> Report:
    """Replaces every safe occurrence of a pattern in one graph, in place; near misses are declined with a reason."""
    view = GraphView(graph, situation.autocast, operations)
    report = Report()
    accepted: list[Candidate[Any]] = []
    taken: set[Node] = set()
    for found in pattern.find(view, taken, situation):
        match: Candidate[Any] | None = None if isinstance(found, NearMiss) else found
        problem = found.problem if match is None else _problem(pattern, view, match, situation, taken)
        if problem is not None:
            report.declines.append(decline_of(pattern.name, found.nodes, found.anchor, problem))
        elif match is not None:
            accepted.append(match)
            taken |= match.nodes
            report.matches.append(_match(pattern, match))
    editor = Editor(view)
    for candidate in accepted:
        pattern.replace(editor, candidate)
    return report


def _problem(
    pattern: Pattern[Any], view: GraphView, candidate: Candidate[Any], situation: Situation, taken: set[Node]
) -> Problem | None:
    for node in candidate.nodes & taken:
        return Problem(Reason.OVERLAP, f"{node.name} is already fused", node)
    if situation.body_of is not None:
        return Problem(Reason.HIGHER_ORDER, f"the body of {situation.body_of} is left alone", candidate.anchor)
    if situation.kept_input:
        detail = f"{situation.kept_input} is written to; checkpoints on a memory budget would keep it for backward"
        return Problem(Reason.MUTATION, detail, candidate.anchor)
    if candidate.draws and not situation.own_random_numbers:
        detail = "fallback_random or align_random_eager asks for eager's random numbers"
        return Problem(Reason.FALLBACK_RANDOM, detail, candidate.anchor)
    read = [value for value in (*candidate.call.arguments(), *candidate.parts) if isinstance(value, Node)]
    inputs = [node for node in read if value_of(node) is not None]
    scalars = [node for node in read if value_of(node) is None]
    return find_problem(view, candidate.nodes, candidate.outputs, inputs, scalars) or pattern.check(view, candidate)


def _match(pattern: Pattern[Any], candidate: Candidate[Any]) -> Match:
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
