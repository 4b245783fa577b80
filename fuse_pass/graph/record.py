"""Puts what a Python function does with tensors into a graph, call by call, as Dynamo would have captured it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.overrides import TorchFunctionMode, handle_torch_function

from fuse_pass.graph.edit import Editor, RewriteError
from fuse_pass.inductor import private

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Recorder(TorchFunctionMode):
    """While it is active, every call of torch runs on fake values and becomes a node where the editor inserts.

    The function that is recorded gets its arguments from `value_of` and may read sizes, but not compute with them.
    """

    def __init__(self, editor: Editor) -> None:
        super().__init__()
        self._editor = editor
        self._values: list[Any] = []  # kept alive, since their ids are the keys of
        self._nodes: dict[int, Node] = {}
        self._traced: dict[Callable[..., Any], Callable[[Node], Node]] = {}

    def value_of(self, argument: Any) -> Any:
        """The fake value of a node, which stands for it in the function; anything else as it is."""
        if not isinstance(argument, Node):
            return argument
        node = self._editor.current(argument)
        return self._remember(node, node.meta["example_value"])

    def node_of(self, value: Any) -> Any:
        """The node that a value in the function came from; anything that needs none as it is."""
        node = self._nodes.get(id(value))
        if node is not None:
            return node
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, (Tensor, *_SYMBOLS)):
            raise RewriteError(f"{value} of a recorded function comes from no node")
        return value

    def step(self, insert: Callable[[Node], Node]) -> Callable[[Tensor], Tensor]:
        """A function of one tensor whose nodes `insert` adds by itself."""

        def call(x: Tensor) -> Tensor:
            result: Tensor = handle_torch_function(call, (x,), x)
            return result

        self._traced[call] = insert
        return call

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in self._traced:
            node = self._traced[function](self.node_of(args[0]))
            return self._remember(node, node.meta["example_value"])
        name = getattr(function, "__name__", "")
        if name == "__get__":  # an attribute such as `shape`
            return function(*args, **(kwargs or {}))
        target = name if getattr(Tensor, name, None) is function else function
        arguments, options = private.tree_map(self.node_of, (tuple(args), kwargs or {}))
        node = self._editor.call(target, *arguments, **options)
        result = node.meta["example_value"]
        if isinstance(result, Tensor):
            return self._remember(node, result)
        if not isinstance(result, (tuple, list)):
            raise RewriteError(f"{name} in a recorded function gives {result!r}, which is no tensor")
        return tuple(self._item(node, i, part) for i, part in enumerate(result))

    def _item(self, node: Node, index: int, part: Any) -> Any:
        return self._remember(self._editor.item(node, index), part)

    def _remember(self, node: Node, value: Any) -> Any:
        if isinstance(value, (Tensor, *_SYMBOLS)):  # a plain number is no proof of where it came from
            self._values.append(value)
            self._nodes[id(value)] = node
        return value

    def _size(self, number: torch.SymInt) -> Node:
        """A size that the function read from one of its tensors."""
        for value in self._values:
            for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr == number.node.expr:
                    node = self._editor.call("size", self._nodes[id(value)], dim)
                    self._remember(node, number)
                    return node
        raise RewriteError(f"{number} of a recorded function is no size of its tensors")
