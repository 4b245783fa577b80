"""A fused model as a program: saved, freed of fuse_pass, and run in a process where it is not installed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

import fuse_pass

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Dropout(0.1), nn.LayerNorm(64)).eval()
packed = fuse_pass.pack(model, "int8", exclude="0")
x = torch.randn(8, 64)

ELSEWHERE = """
import sys; sys.modules["fuse_pass"] = None  # as if it were not installed
import torch
x, expected = torch.load("case.pt")
found = torch.export.load("program.pt2").module()(x)
print(f"{(found - expected).abs().max():.0e}")
"""

for name, candidate in (("float32", model), ("packed to int8", packed)):
    with torch.no_grad(), fuse_pass.collect() as report:
        program = fuse_pass.fuse(candidate, (x,), dynamic_shapes=({0: Dim("rows", min=2)},))
    assert torch.allclose(program.module()(x[:5]), candidate(x[:5]), atol=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program.run_decompositions(fuse_pass.decompositions()), Path(folder, "program.pt2"))
        torch.save((x, candidate(x).detach()), Path(folder, "case.pt"))
        command = [sys.executable, "-c", ELSEWHERE]
        error = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout.strip()
    assert float(error) < 1e-5
    print(f"torch.export, {name}: fused {dict(report.counts())}; without fuse_pass off by {error} at most")
