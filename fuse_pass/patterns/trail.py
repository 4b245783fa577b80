"""Walking up a graph from what a Linear reads, through what keeps values, rounds them, or drops some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from fuse_pass.graph.convolution import CHANNELS
from fuse_pass.graph.safety import Problem
from fuse_pass.graph.shapes import same_shape, value_of
from fuse_pass.graph.view import GraphView, Linear, Walk
from fuse_pass.ops.fake_quantize import FakeQuantize
from fuse_pass.ops.fused_op import declaration_of
from fuse_pass.ops.packed_format import pack
from fuse_pass.patterns.channels import features_become_channels
from fuse_pass.report import Reason


class Trail:
    """A way up a graph; casts, views and inactive dropouts are passed by themselves.

    Args:
        view: the graph.
        start: the first node on the way.
        passed: nodes before it that go with it.

    Attributes:
        nodes: all that were passed.
        turned: the node on the way that makes rows the channels of an image, if there is one.
    """

    def __init__(self, view: GraphView, start: Node, passed: Iterable[Node] = ()) -> None:
        self.nodes = [*passed]
        self.turned: Node | None = None
        self._view = view
        self._walks: list[Walk] = []
        self._below: list[Walk] = []
        self._walk(start)

    @property
    def end(self) -> Node:
        """Where it has come to."""
        return (self._walks or self._below)[-1].node

    def past(self, nodes: Iterable[Node], source: Node) -> None:
        """On from an operation that these nodes compute to what it reads."""
        self.nodes += nodes
        self._walk(source)

    def _walk(self, start: Node) -> None:
        self._walks.append(self._view.walk_up(start))
        self.nodes += self._walks[-1].passed

    def through_quantization(self) -> list[int]:
        """Past deterministic fake quantisation; returns its settings as an op takes them, or none.

        A layer that quantises its result is often followed by one that quantises its input, behind a view or in another
        format: the settings are those of both then, in order, and of one where the second changes nothing.
        """
        settings: list[int] = []
        last: list[int] = []
        while (found := _quantization_at(self.end)) is not None:
            packed = pack(found.how)
            self.past((self.end,), found.x)  # type: ignore[arg-type]  # a node in the place of a tensor
            if packed != last:
                settings, last = [*packed, *settings], packed
        return settings

    def through_dropout(self) -> Any:
        """Past an active dropout; returns its p, or 0 where there is none."""
        dropout = self._view.op(self.end)
        if dropout is None or dropout.kind != "dropout":
            return 0.0
        if dropout.in_place and not self._view.owns_its_input(dropout):
            return 0.0
        self.past((self.end,), dropout["input"])
        return dropout["p"]

    def through_turn(self, second: Linear) -> None:
        """Past the first node that makes rows the channels that a 1×1 convolution reads, as they are."""
        node = self.end
        if self.turned is None and features_become_channels(self._view, second, node):
            self.turned, self._below, self._walks = node, self._walks, []
            self.past((node,), node.args[0])  # type: ignore[arg-type]  # a tensor is permuted

    def problem_of_rows(self, features: int) -> Problem | None:
        """Rows of a Linear may be rearranged and put back; pixels of a convolution may not.

        Args:
            features: of the Linear above, the dimension that it acts along.
        """
        problem = self.problem_of_casts()
        if problem is not None:
            return problem
        for walk in self._walks:
            if features == CHANNELS and walk.passed:
                start, end = value_of(walk.node), value_of(walk.passed[0])
                if start is None or end is None or not same_shape(start.shape, end.shape):
                    return Problem(Reason.LAYOUT, f"{walk.passed[0].name} changes the shape", walk.passed[0])
            elif walk.moves_rows is not None:
                return Problem(Reason.LAYOUT, f"{walk.moves_rows.name} changes the last dimension", walk.moves_rows)
        return None

    def problem_of_casts(self) -> Problem | None:
        for cast in (cast for walk in (*self._below, *self._walks) for cast in walk.casts):
            return Problem(Reason.DTYPES, f"{cast.name} casts between the two Linear layers", cast)
        return None


def _quantization_at(node: Node) -> FakeQuantize | None:
    """A fake quantisation that an op can do inside."""
    if declaration_of(node.target) is not FakeQuantize:
        return None
    call = FakeQuantize.of_call(node.args, node.kwargs)
    return call if call.seed is None and not call.clip_grad and isinstance(call.x, Node) else None
