"""Fused graphs as programs of their own: `fuse` makes one, and `decompositions` frees one of our ops.

Programs start from what `torch.export` captures by Dynamo, as the patterns know it from compiling: one node per
operation of a layer, with its place in the model. The graph of a finished `ExportedProgram` is of aten operations;
`FuseBackend.rewrite` takes it as well, before `run_decompositions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fuse_pass.backend import FuseBackend
from fuse_pass.calling import with_opaque_layers_quantized, without_fast_path
from fuse_pass.inductor import exporting, private
from fuse_pass.numerics.formats import Format
from fuse_pass.numerics.spec import QuantSpec
from fuse_pass.ops import library
from fuse_pass.report import publish


def fuse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    patterns: Iterable[str] | None = None,
    quantize: QuantSpec | Format | str | None = None,
    strict: bool = False,
) -> ExportedProgram:
    """The fused graph of a model as a program, which `torch.export.save` saves and every process with fuse_pass runs.

    It is traced in the mode in which it would be called: train or eval, under `no_grad` or not, with autocast or
    without. Evaluate under `torch.no_grad()`, or the program computes what backward would need as well. In training, a
    program draws a seed for its dropouts in every call, following `torch.manual_seed`. What was fused goes to every
    open `fuse_pass.collect()`.

    Args:
        model: the module; of one that `torch.compile` or `fuse_pass.compile` has compiled, what is inside.
        args: example arguments.
        kwargs: example keyword arguments.
        dynamic_shapes: as for `torch.export.export`; every size is fixed without.
        patterns: names of the patterns to apply; None for all.
        quantize: inserts fake quantisation, as for `fuse_pass.compile`; layers that are one call in a graph are
            converted in a copy.
        strict: raise where a pass fails, instead of warning and exporting without fusions.

    Raises:
        TypeError: `model` is no module, or `args` no tuple.
        ValueError: an unknown pattern name.
        torch._dynamo.exc.UserError, torch._dynamo.exc.Unsupported: what `torch.export.export(…, strict=True)` raises of
            a model that is not one graph, or of shapes that do not fit it.
    """
    model = private.uncompiled(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected a torch.nn.Module, got {model!r}; make a module of a function that calls it")
    if not isinstance(args, tuple):
        raise TypeError(
            f"fuse: expected a tuple of example arguments, got {type(args).__name__}; write fuse(model, (x,))"
        )
    backend = FuseBackend(patterns, quantize=quantize, strict=strict)
    if backend.options.quantize is not None:
        model = with_opaque_layers_quantized(model, backend.options.quantize)
    given = dict(kwargs or {})
    graph = without_fast_path(exporting.captured)(model, args, given, dynamic_shapes)
    fused, report = backend.rewrite(graph)
    publish(report)
    return torch.export.export(exporting.with_state_of(model, fused), args, given, dynamic_shapes=dynamic_shapes)


def decompositions() -> dict[private.OpOverload, Callable[..., Any]]:
    """What every op of ours computes, in aten operations: for programs that run where fuse_pass is not installed.

        program = fuse_pass.fuse(model, (x,)).run_decompositions(fuse_pass.decompositions())

    leaves no op of ours, and `torch.export.load` needs PyTorch alone. So does it with programs that
    `torch.export.export` makes of models with our layers, converted and packed ones included. Results are those of the
    ops up to the order of sums; sums of integers are exact on every machine, and on a CPU dropouts draw the same masks.

    What is lost: packed weights are unpacked in every call, as our C++ stays behind; backward keeps what PyTorch keeps.
    """
    return dict(library.in_aten())
