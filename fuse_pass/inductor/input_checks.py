"""Leaves out what the generated code would check a second time: sizes and strides of a graph's inputs.

Dynamo's guards compare both at every call, from torch 2.12 on of parameters and buffers too, before they let the
compiled graph run. Inductor's Python wrapper then asserts them once more, 0.4 us each: 17 of 149 us in a BERT of two
layers and 17 tokens (one AMD Zen 5 core, torch 2.13). The rest stays: what is asserted of results, inputs of sizes that
vary, backward (hooks on saved tensors may hand over anything), graphs with nothing of ours, and what is compiled
without Dynamo.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import sympy  # type: ignore[import-untyped]  # with torch
import torch
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.ir import IRNode
from torch._inductor.virtualized import V
from torch.fx import GraphModule

from fuse_pass.inductor import compiler


def are_in_guards(gm: GraphModule) -> bool:
    """Whether a graph that is compiled now came from Dynamo, with a guard on every tensor that it reads."""
    if torch.__version__ < "2.12":  # whoever sets the data of a parameter gets another size past the guards
        return False
    keeps_tensors = next(itertools.chain(gm.parameters(), gm.buffers()), None) is not None
    return torch._guards.TracingContext.try_get() is not None and not keeps_tensors


_write_checks = PythonWrapperCodegen.codegen_input_size_asserts
_lock = threading.Lock()
_compilations: list[None] = []


@contextlib.contextmanager
def left_to_guards() -> Iterator[None]:
    """While code is generated, Inductor leaves out the checks of graphs whose joint pass says `guarded_inputs`.

    Other threads may compile meanwhile: their graphs say nothing of the kind, and are as always.
    """
    with _lock:
        _compilations.append(None)
        PythonWrapperCodegen.codegen_input_size_asserts = _write_needed_checks  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        with _lock:
            _compilations.pop()
            if not _compilations:
                PythonWrapperCodegen.codegen_input_size_asserts = _write_checks  # type: ignore[method-assign]


def _write_needed_checks(wrapper: PythonWrapperCodegen) -> None:
    if V.graph.is_backward or not any(getattr(run, "guarded_inputs", False) for run in compiler.joint_passes({})):
        _write_checks(wrapper)
        return
    varying = {name: value for name, value in wrapper.get_graph_inputs().items() if not _is_of_fixed_size(value)}
    with mock.patch.object(wrapper, "get_graph_inputs", return_value=varying):
        _write_checks(wrapper)


def _is_of_fixed_size(value: Any) -> bool:
    return isinstance(value, IRNode) and all(
        isinstance(size, (int, sympy.Integer)) for size in (*value.get_size(), *value.get_stride())
    )
