"""Adds fake quantisation to a graph: each value and site once until something may have written into it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fuse_pass.graph.edit import Editor
from fuse_pass.graph.record import Recorder
from fuse_pass.graph.shapes import memory_of, value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.quantization.functional import quantize_at


class Inserter:
    """What has been quantised in one graph so far, and how more is."""

    def __init__(self, view: GraphView, spec: QuantSpec) -> None:
        self.editor = Editor(view)
        self.spec = spec
        self._known: dict[tuple[Node, Site], Node] = {}
        self._results: dict[Node, Site] = {}

    def forget(self, writer: Node | None = None) -> None:
        """Nothing that was quantised before is to be read again; what `writer` may write into is no result any more."""
        self._known.clear()
        if writer is None:
            return
        written = [value_of(node) for node in writer.all_input_nodes]
        places = {memory_of(value) for value in written if value is not None and value.layout is torch.strided}
        for result in list(self._results):
            value = value_of(result)
            if value is None or memory_of(value) in places:
                del self._results[result]

    def once(self, operand: Node, site: Site) -> Node:
        """A value as the site has it, wherever the editor inserts now."""
        if site.is_idempotent and self._results.get(operand) == site:
            return operand
        key = (operand, site)
        if key not in self._known:
            self._known[key] = self._call(operand, site)
        return self._known[key]

    def quantize_result(self, node: Node, sites: Sequence[Site]) -> None:
        """Lets all readers of a node read it quantised."""
        readers = list(node.users)
        with self.editor.after(node):
            new = node
            for i, site in enumerate(sites):
                new = new if i and site == sites[i - 1] and site.is_idempotent else self._call(new, site)
        if new is not node:
            self.editor.stands_for(new, node)
            for reader in readers:
                reader.replace_input_with(node, new)
            self._results[new] = sites[-1]

    def open(self, node: Node, function: Callable[[Recorder, Callable[[Tensor], Tensor]], Any]) -> Any:
        """Puts the operations of `function(recorder, rounded)` before a node; returns the nodes of its results."""
        with self.editor.before(node):
            recorder = Recorder(self.editor)
            site = self.spec.output
            rounded = recorder.step(lambda value: value if site is None else self._call(value, site))
            with recorder:
                results = function(recorder, rounded)
            return tuple(recorder.node_of(result) for result in results)

    def replace(self, old: Node, new: Node, *, is_quantized: bool = False) -> Node:
        """Lets all readers of `old` read `new`, in the memory layout of `old`, and removes `old`."""
        with self.editor.before(old):
            new = self.editor.laid_out_as(old, new)
        self.editor.replace(old, new)
        old.graph.erase_node(old)
        if is_quantized and self.spec.output is not None:
            self._results[new] = self.spec.output
        return new

    def _call(self, node: Node, site: Site) -> Node:
        return self.editor.traced(functools.partial(quantize_at, site), node)
