"""`torch.onnx.export` for models with our layers: their ops become operators of ONNX before it translates the rest."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fuse_pass.integrations.onnx import bodies, opset
from fuse_pass.integrations.onnx.packed import in_file_order
from fuse_pass.numerics.rounding import STOCHASTIC

_NEEDS = ("onnx", "onnxscript")


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    opset_version: int | None = None,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """`torch.onnx.export(model, args, f, dynamo=True)` of a model with layers and ops of fuse_pass.

    Fused layers become standard operators, integer fake quantisation and fp8 QuantizeLinear and DequantizeLinear,
    other formats arithmetic; packed weights stay packed in the file, for MatMulNBits (com.microsoft, of ONNX Runtime)
    or MatMulInteger. The model itself stays as it is.

    Args:
        model: a model, exported as it stands: call `eval()` first. Or a program of `torch.export.export`, in which
            packed weights keep the order of our own kernels.
        args: example inputs.
        f: where to save; None to save later.
        kwargs: further example inputs, by name.
        opset_version: of the operators; by default 21, which has a word for everything.
        dynamic_shapes: see `torch.export.export`.
        **options: of `torch.onnx.export`, e.g. `input_names`, `external_data`, `optimize`.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        OpsetError: a ValueError; the model needs a newer `opset_version`.
        NotImplementedError: the model draws random numbers with our ops (dropout in training, stochastic rounding), or
            is on the meta device. What torch.onnx refuses, it refuses itself.
    """
    require_packages()
    version = opset.Opset(opset.DEFAULT if opset_version is None else opset_version)
    if isinstance(model, torch.export.ExportedProgram):
        program = model
    else:
        _require_data(model)
        program = torch.export.export(in_file_order(model), args, kwargs, dynamic_shapes=dynamic_shapes)
    program = in_operators_of_onnx(program, version)
    made = torch.onnx.export(program, (), f, opset_version=version.version, dynamo=True, **options)
    assert made is not None
    return made


def in_operators_of_onnx(program: torch.export.ExportedProgram, version: opset.Opset) -> torch.export.ExportedProgram:
    """The program without any op of ours; the raises are those of `export`."""
    _require_inference(program)
    table: dict[Any, Any] = dict(bodies.table(version))
    if any(_name_of(node) == "fake_quantize_int" for node in program.graph.nodes):
        table[torch.ops.aten.linear.default] = bodies.linear_of_rows
    program = program.run_decompositions(table)
    left = sorted({_name_of(node) for node in program.graph.nodes} - {""})
    if left:
        raise NotImplementedError(f"ONNX export: expected a body for every op of fuse_pass, there is none for {left}")
    return program


def require_packages() -> None:
    """ModuleNotFoundError, with what to install, where torch.onnx could not work."""
    missing = [name for name in _NEEDS if sys.modules.get(name, "") is None or importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"fuse_pass.integrations.onnx needs {' and '.join(missing)}: pip install 'fuse_pass[onnx]'", name=missing[0]
        )


def _require_data(model: nn.Module) -> None:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise NotImplementedError(f"ONNX export: expected a model with data, got {name!r} on the meta device")


def _require_inference(program: torch.export.ExportedProgram) -> None:
    """Names the layer that cannot be exported."""
    for node in program.graph.nodes:
        name = _name_of(node)
        reason = bodies.refusal(name) if name else None
        if name and any(isinstance(value, str) and value in STOCHASTIC for value in node.args):
            reason = "rounds at random"
        if reason is not None:
            raise NotImplementedError(
                f"ONNX export: {_layer_of(node)} calls fuse_pass.{name}, which {reason}; call model.eval() first, and "
                "use a deterministic rounding mode"
            )


def _name_of(node: torch.fx.Node) -> str:
    """Of an op of ours that a node calls; else empty."""
    found = str(node.target).removesuffix(".default") if node.op == "call_function" else ""
    return found.removeprefix("fuse_pass.") if found.startswith("fuse_pass.") else ""


def _layer_of(node: torch.fx.Node) -> str:
    """The innermost module that a node comes from, in words."""
    stack: Sequence[Any] = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "the program"
    path, kind = stack[-1]
    return f"layer {path!r} ({str(getattr(kind, '__name__', kind)).rsplit('.', 1)[-1]})"
