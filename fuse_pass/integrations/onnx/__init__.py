"""ONNX: `fuse_pass.integrations.onnx.export(model, args, "model.onnx")`. Needs `pip install fuse_pass[onnx]`."""

from fuse_pass.integrations.onnx.export import export
from fuse_pass.integrations.onnx.opset import OpsetError

__all__ = ["OpsetError", "export"]
