"""ONNX Runtime: the model exported to ONNX, quantised by its own tools."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuse_pass.bench.against.contender import (
    FLOAT,
    GROUP,
    INT4_WEIGHT_ONLY,
    INT8,
    INT8_WEIGHT_ONLY,
    Built,
    Contender,
    Task,
)

# The accuracy level of MatMulNBits at which its kernels round inputs to int8, in blocks. With weights of 8 bits and
# inputs in float32 it takes 16 times as long (one row), so nobody would choose that.
_INPUTS_IN_INT8 = 4


def _float(task: Task) -> Built:
    return _session(_exported(task), task)


def _int8(task: Task) -> Built:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:  # it writes a file
        path = Path(folder, "quantized.onnx")
        quantize_dynamic(_exported(task), path, per_channel=True, weight_type=QuantType.QInt8)
        return _session(onnx.load(path), task)


def _int8_weight_only(task: Task) -> Built:
    return _few_bits(task, 8)


def _int4_weight_only(task: Task) -> Built:
    return _few_bits(task, 4)


def _few_bits(task: Task, bits: int) -> Built:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = _with_matmul(_exported(task))
    quantizer = MatMulNBitsQuantizer(
        model, bits=bits, block_size=GROUP, is_symmetric=True, accuracy_level=_INPUTS_IN_INT8
    )
    quantizer.process()
    return _session(quantizer.model.model, task)


def _exported(task: Task) -> Any:
    """The model as an ONNX protocol buffer, in memory."""
    model, inputs = task.positional()
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None, "what dynamo=True returns"
    return program.model_proto


def _with_matmul(model: Any) -> Any:
    """`Gemm(x, W, b, transB=1)`, which `MatMulNBitsQuantizer` passes by, as `MatMul` and `Add`."""
    import onnx
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[Any] = []
    for node in model.graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = attributes.get("alpha", 1) == attributes.get("beta", 1) == 1 and not attributes.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in weights:
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        name = f"{node.name}_weight"
        value = weight.T.copy() if attributes.get("transB", 0) else weight
        model.graph.initializer.append(numpy_helper.from_array(value, name))
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [f"{node.name}_product"]))
        nodes.append(helper.make_node("Add", [f"{node.name}_product", node.input[2]], list(node.output)))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


def _session(model: Any, task: Task) -> Built:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    _, inputs = task.positional()
    names = [value.name for value in session.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return Built(lambda: session.run(None, feeds), _tensors)


def _tensors(arrays: list[Any]) -> list[Tensor]:
    return [torch.as_tensor(array) for array in arrays]


ONNXRUNTIME = Contender(
    "onnxruntime",
    ("onnxruntime", "onnx", "onnxscript"),
    "fuse_pass[contenders]",
    {FLOAT: _float, INT8: _int8, INT8_WEIGHT_ONLY: _int8_weight_only, INT4_WEIGHT_ONLY: _int4_weight_only},
)
