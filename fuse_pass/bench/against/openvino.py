"""OpenVINO: the model converted from PyTorch; weights compressed by nncf.

Where weights are compressed, its CPU plugin rounds inputs to int8, in groups, unless it is told not to. That is its way
to dynamic int8, and what a user of int4 gets.
"""

from __future__ import annotations

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

_AS_THEY_ARE = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def _float(task: Task) -> Built:
    return _request(_converted(task), task)


def _int8(task: Task) -> Built:
    return _request(_compressed(task, "INT8_SYM"), task)


def _int8_weight_only(task: Task) -> Built:
    return _request(_compressed(task, "INT8_SYM"), task, _AS_THEY_ARE)


def _int4_weight_only(task: Task) -> Built:
    return _request(_compressed(task, "INT4_SYM", group_size=GROUP, ratio=1.0, all_layers=True), task)


def _compressed(task: Task, mode: str, **settings: Any) -> Any:
    import nncf

    return nncf.compress_weights(_converted(task), mode=nncf.CompressWeightsMode[mode], **settings)


def _converted(task: Task) -> Any:
    import openvino

    model, inputs = task.positional()
    with torch.no_grad():
        converted = openvino.convert_model(model, example_input=inputs if len(inputs) > 1 else inputs[0])
    converted.reshape({port: list(x.shape) for port, x in zip(converted.inputs, inputs, strict=True)})
    return converted


def _request(model: Any, task: Task, settings: dict[str, Any] | None = None) -> Built:
    import openvino

    precision = "bf16" if task.dtype is torch.bfloat16 else "f32"
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": task.threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # the process is pinned already
            "INFERENCE_PRECISION_HINT": precision,
            **(settings or {}),
        },
    )
    request = compiled.create_infer_request()
    _, tensors = task.positional()
    inputs = [_shared(tensor) for tensor in tensors]
    return Built(lambda: request.infer(inputs, share_inputs=True, share_outputs=True), _tensors)


def _shared(tensor: Tensor) -> Any:
    """NumPy has no bfloat16, so OpenVINO is told what the bits mean."""
    import openvino

    if tensor.dtype is not torch.bfloat16:
        return tensor.contiguous().numpy()
    return openvino.Tensor(tensor.contiguous().view(torch.int16).numpy(), list(tensor.shape), openvino.Type.bf16)


def _tensors(result: Any) -> list[Tensor]:
    import openvino

    def read(port: Any, array: Any) -> Tensor:
        if port.get_element_type() != openvino.Type.bf16:
            return torch.as_tensor(array)
        return torch.as_tensor(array.view("int16")).view(torch.bfloat16)

    return [read(port, array) for port, array in result.items()]


OPENVINO = Contender(
    "openvino",
    ("openvino", "nncf"),
    "fuse_pass[contenders]",
    {FLOAT: _float, INT8: _int8, INT8_WEIGHT_ONLY: _int8_weight_only, INT4_WEIGHT_ONLY: _int4_weight_only},
)
