"""A model through ONNX Runtime, beside the model itself."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from fuse_pass.integrations.onnx import export

onnxruntime.set_default_logger_severity(3)


class Exported:
    """A model as ONNX Runtime runs it; `nodes` counts its operators."""

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.program = export(model, args, verbose=False, **options)
        self.proto = self.program.model_proto
        self.nodes = Counter(node.op_type for node in self.proto.graph.node)
        self._session = onnxruntime.InferenceSession(self.proto.SerializeToString())

    def __call__(self, *args: Tensor) -> Any:
        names = [given.name for given in self._session.get_inputs()]
        results = self._session.run(None, {name: as_numpy(arg) for name, arg in zip(names, args, strict=True)})
        tensors = [torch.from_numpy(np.array(result)) for result in results]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    @property
    def size(self) -> int:
        """Bytes of the weights in the file; beside them are the names and traces of torch.onnx."""
        return sum(len(value.raw_data) for value in self.proto.graph.initializer)


def as_numpy(value: Tensor) -> np.ndarray:
    return value.detach().contiguous().numpy()


def differing(a: Tensor, b: Tensor) -> Tensor:
    """Where the bits differ; NaN is one number."""
    same = ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())
    return ~same


def assert_same_bits(actual: Tensor, expected: Tensor, x: Tensor | None = None) -> None:
    assert actual.dtype is expected.dtype
    assert actual.shape == expected.shape
    wrong = differing(actual, expected)
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        given = "" if x is None else f" for {x[place].item()!r}"
        got = f"{actual[place].item()!r}, expected {expected[place].item()!r}"
        raise AssertionError(f"{int(wrong.sum())} of {wrong.numel()} differ, the first at {place}{given}: {got}")
