"""A model converted to int8, calibrated, and run by ONNX Runtime: pip install 'fuse_pass[onnx]' onnxruntime."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import fuse_pass
from fuse_pass.integrations.onnx import export

torch.manual_seed(0)  # what lies next to a tie between two integers may become either
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), fuse_pass.FusedDropoutLayerNorm(64))
quantized = fuse_pass.convert(model.eval(), "int8")
x = torch.randn(8, 64)
fuse_pass.calibrate(quantized, [x])

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.onnx"
    export(quantized, (x,), path, input_names=["x"], dynamic_shapes=({0: torch.export.Dim("batch")},))
    session = onnxruntime.InferenceSession(path)
    (y,) = session.run(None, {"x": x.numpy()})

expected = quantized(x)
difference = (torch.from_numpy(y) - expected).abs().max()
print(f"int8 in ONNX Runtime: fused by ONNX Runtime itself; within {difference:.0e} of PyTorch's")
torch.testing.assert_close(torch.from_numpy(y), expected, atol=1e-4, rtol=1e-4)
