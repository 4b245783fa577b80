"""Writing Dynamo graphs: copy, insert, replace, verify. A replacement with other metadata is an error."""

from __future__ import annotations

import contextlib
import gc
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fuse_pass.graph.places import nodes_to_move, place_for
from fuse_pass.graph.shapes import is_plain, memory_order, same_shape, same_strides, value_of
from fuse_pass.graph.view import GraphView
from fuse_pass.inductor import private


class RewriteError(RuntimeError):
    """A replacement would have changed what the graph computes; the rewrite is undone."""


def copy_graph_module(module: GraphModule) -> GraphModule:
    """A copy that can be rewritten, sub-graphs included; parameters and everything that Dynamo noted are shared.

    AOTAutograd needs `_param_name_to_source` and each placeholder's `_dynamo_source` for its cache and its guards, and
    `_backend_id` to be found by the next process that precompiles. What else Dynamo notes would only make its cache
    key depend on where the model is called from (`_source_to_user_stacks`).
    """
    graph = Graph()
    twins: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, twins)
    private.take_calling_convention(graph, module.graph)
    new_output = graph.output(output)
    for node in module.graph.nodes:
        if node.op == "output":
            new_output.meta = dict(node.meta)
    copy = private.lazy_graph_module(module, graph)
    copy.meta.update(module.meta)
    for name in ("_param_name_to_source", "_backend_id", "compile_subgraph_reason"):
        if hasattr(module, name):
            setattr(copy, name, getattr(module, name))
    for original, twin in twins.items():
        private.share_source(original, twin)
    for name, child in module.named_children():
        if isinstance(child, GraphModule) and hasattr(copy, name):
            setattr(copy, name, copy_graph_module(child))
    return copy


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """While a graph is rewritten Python's garbage collector is off, unless it was before.

    Nodes refer to each other: the collector would walk all of a large graph again and again and free nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def hoist_scalars(graph: Graph) -> None:
    """Moves the numbers of a dynamic graph to its start, so that they are known wherever an op of ours may stand.

    With `dynamic=True`, Dynamo passes p and eps in as 0-d tensors and reads them by `item()` just before their use.
    """
    placeholders = graph.find_nodes(op="placeholder")
    for placeholder in reversed(placeholders):
        # Where nothing but `item` reads the tensor, nothing in the graph can have written it before.
        if all(user.op == "call_method" and user.target == "item" for user in placeholder.users):
            for user in reversed(placeholder.users):
                placeholders[-1].append(user)


class Editor:
    """Replaces groups of nodes of one graph by calls of our ops, with the metadata that AOTAutograd's cache needs."""

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self._graph = view.graph
        self._replaced: dict[Node, Node] = {}
        self._results: dict[Any, Any] = {}

    def current(self, node: Any) -> Any:
        """What stands for a node of the view now (an earlier replacement may have taken its place)."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    @contextlib.contextmanager
    def at(self, outputs: Sequence[Node], group: Iterable[Node], inputs: Iterable[Node | None] = ()) -> Iterator[None]:
        """Inserts before the first outside reader of any output, at the latest where the group ends.

        What `inputs` compute too late is moved before it, as `graph.safety` has found that it may be.
        """
        members = set(group)
        last = max(members, key=self._view.position.__getitem__)
        # Calls that earlier replacements have added count as readers; nodes compare by their place in the graph.
        point = min([last, *(user for node in outputs for user in node.users if user not in members)])
        point = place_for(self._view, point, last)
        for late in [node for node in map(self.current, inputs) if node is not None and not node < point]:
            for node in nodes_to_move(self._view, late, point, members) or ():
                point.prepend(node)
                self._view.position[node] = self._view.position[point]
        self._like = last
        with self._graph.inserting_before(point):
            yield

    @contextlib.contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """Inserts directly before a node."""
        self._like = node
        with self._graph.inserting_before(node):
            yield

    @contextlib.contextmanager
    def after(self, node: Node) -> Iterator[None]:
        """Inserts directly after a node, in order."""
        self._like = node
        with self._graph.inserting_before(node.next):
            yield

    def trace(self, function: Callable[..., Any], *nodes: Node, pre_dispatch: bool = False) -> Graph:
        """The operations that `function(*tensors)` runs on the values of nodes, with fake values as Dynamo notes them.

        Args:
            function: called once.
            *nodes: whose values are its arguments.
            pre_dispatch: record what PyTorch is called with, before autocast and autograd look at it.
        """
        # With no table at all, torch 2.14 writes `detach` as `alias`, through which gradients flow.
        record = private.make_fx(function, decomposition_table={}, pre_dispatch=pre_dispatch)
        with self._surroundings():
            traced = record(*(node.meta["example_value"] for node in nodes))
        for node in traced.graph.nodes:
            node.meta["example_value"] = node.meta.get("val")
        return traced.graph

    def inline(self, traced: Graph, *nodes: Node) -> Any:
        """Adds the operations of a traced graph, called on nodes; returns what stands for its results."""
        twins: dict[Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), nodes, strict=True))
        for inner in traced.nodes:
            if inner.op == "call_function":
                arguments, options = map_arg((inner.args, inner.kwargs), twins.__getitem__)
                twins[inner] = self.call(inner.target, *arguments, **options)
            elif inner.op not in ("placeholder", "output"):
                raise RewriteError(f"{self._like.name}: {inner.op} {inner.target} cannot be copied into a graph")
        return map_arg(traced.output_node().args[0], twins.__getitem__)

    def traced(self, function: Callable[[Tensor], Tensor], node: Node) -> Node:
        """Adds the operations that `function(tensor)` runs on the value of a node; returns the one with the result."""
        result: Node = self.inline(self.trace(function, node), node)
        return result

    def call(self, target: Callable[..., Any] | str, *arguments: Any, **options: Any) -> Node:
        """Adds a call (of a function, or of a method if `target` is a name) and computes its fake value."""
        arguments, options = map_arg((arguments, options), self.current)
        return self._add(target, arguments, options, self._fake_result(target, arguments, options))

    def call_ours(self, op: private.OpOverload, *arguments: Any, **options: Any) -> Node:
        """Adds a call of an op of ours, with the fake value of the last call that was like it.

        Its fake kernel takes long, and the layers of a model call it again and again with tensors of the same sizes.
        """
        arguments, options = map_arg((arguments, options), self.current)
        given = (arguments, tuple(options.items()))
        try:
            key = op, _metadata(map_arg(given, _example_value)), _metadata(self._view.autocast_stack(self._like))
        except _UnknownMetadata:
            return self._add(op, arguments, options, self._fake_result(op, arguments, options))
        if key not in self._results:
            self._results[key] = self._fake_result(op, arguments, options)
        return self._add(op, arguments, options, self._results[key])

    def item(self, node: Node, index: int) -> Node:
        """`node[index]` of a call that returns several tensors."""
        node = self.current(node)
        return self._add(operator.getitem, (node, index), {}, node.meta["example_value"][index])

    def _add(
        self, target: Callable[..., Any] | str, arguments: tuple[Any, ...], options: dict[str, Any], value: Any
    ) -> Node:
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self._graph.create_node(kind, target, arguments, options)
        node.meta.update({key: self._like.meta[key] for key in _PROVENANCE if key in self._like.meta})
        node.meta["example_value"] = value
        self._view.position[node] = self._view.position[self._like]  # others may be inserted beside it
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Lets every reader of `old` read `new`, after comparing what is known about the two values."""
        self.stands_for(new, old)
        old.replace_all_uses_with(new)
        self._replaced[old] = new

    def stands_for(self, new: Node, old: Node) -> None:
        """Gives `new` the fake value of `old`, which knows requires_grad as Dynamo saw it; compares the two before."""
        require_same_value(old, new)
        new.meta["example_value"] = old.meta["example_value"]

    def laid_out_as(self, old: Node, new: Node) -> Node:
        """The value of `new` in memory as that of `old` is, dimension by dimension."""
        a, b = value_of(old), value_of(new)
        if a is None or b is None or same_strides(a, b):
            return new
        order = memory_order(a)
        back = sorted(range(a.dim()), key=order.__getitem__)
        return self.call("permute", self.call("contiguous", self.call("permute", new, order)), back)

    def erase(self, group: Iterable[Node]) -> None:
        """Removes replaced nodes, and weight transposes that only they have read."""
        members = set(group)
        for node in sorted(members, key=self._view.position.__getitem__, reverse=True):
            sources = node.all_input_nodes
            self._graph.erase_node(node)
            for source in sources:
                if (
                    source not in members
                    and not source.users
                    and self._view.kind(source)
                    in (
                        "matrix_transpose",
                        "transpose",
                        "permute",
                        "getattr",
                    )
                ):
                    self._graph.erase_node(source)

    def _fake_result(
        self, target: Callable[..., Any] | str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        values, named = map_arg((arguments, options), _example_value)
        with self._surroundings():
            if isinstance(target, str):
                return getattr(values[0], target)(*values[1:], **named)
            return target(*values, **named)

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """The modes in which the node that we stand at computes its value."""
        with contextlib.ExitStack() as stack:
            # The mode of the neighbours: the one that is active while a backend runs is another, not to be mixed in.
            values = self._like.meta["example_value"]
            like = values[0] if isinstance(values, (tuple, list)) and values else values
            mode = private.fake_mode_of(like)
            if mode is not None:
                stack.enter_context(mode)
            stack.enter_context(torch.no_grad())
            for device_type, dtype, enabled, cache in self._view.autocast_stack(self._like):
                stack.enter_context(torch.autocast(device_type, dtype, enabled, cache))
            yield


def _example_value(node: Node) -> Any:
    return node.meta["example_value"]


class _UnknownMetadata(Exception):  # noqa: N818 - an outcome, not an error
    """A tensor subclass, or a number that is not the same in every call."""


def _metadata(value: Any) -> Any:
    """What the metadata of results depend on, hashable."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride()) if is_plain(value) else (value,)
        if not all(isinstance(size, int) for size in sizes):
            raise _UnknownMetadata
        return sizes, value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(_metadata(part) for part in value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise _UnknownMetadata
    return value


_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


def require_same_value(old: Node, new: Node) -> None:
    """Raises RewriteError unless shape, dtype, strides, device and layout of two nodes' values agree."""
    a, b = value_of(old), value_of(new)
    if a is None or b is None:
        raise RewriteError(f"{old.name} → {new.name}: expected two tensors, got {a!r} and {b!r}")
    for what, x, y in (("dtype", a.dtype, b.dtype), ("device", a.device, b.device), ("layout", a.layout, b.layout)):
        if x != y:
            raise RewriteError(f"{old.name} → {new.name}: expected {what} {x}, got {y}")
    for what, before, after, same in (
        ("shape", a.shape, b.shape, same_shape(a.shape, b.shape)),
        ("strides", a.stride(), b.stride(), same_strides(a, b)),
    ):
        if not same:
            raise RewriteError(f"{old.name} → {new.name}: expected {what} {tuple(before)}, got {tuple(after)}")


def require_same_outputs(before: GraphModule, after: GraphModule) -> None:
    """Lints the rewritten graph and compares the fake metadata of its outputs with the original's."""
    after.graph.lint()
    old, new = _outputs(before), _outputs(after)
    if len(old) != len(new):
        raise RewriteError(f"expected {len(old)} outputs, got {len(new)}")
    for a, b in zip(old, new, strict=True):
        if value_of(a) is not None or value_of(b) is not None:
            require_same_value(a, b)
            if value_of(a).requires_grad != value_of(b).requires_grad:  # type: ignore[union-attr]
                raise RewriteError(f"output {a.name} → {b.name}: requires_grad differs")


def _outputs(module: GraphModule) -> list[Node]:
    """In order; one that is returned twice is there twice."""
    found: list[Node] = []
    map_arg(module.graph.output_node().args, found.append)
    return found
