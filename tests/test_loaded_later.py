"""Dynamo and Inductor are loaded when something is compiled: each test is a program in a process of its own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fuse_pass

ROOT = Path(fuse_pass.__file__).parents[1]
LOADED = """
import sys
def loaded():
    return [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
"""


def run(program: str) -> list[str]:
    """The lines that a program prints."""
    command = [sys.executable, "-c", LOADED + program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("name", ["fuse_pass", "fuse_pass.nn", "fuse_pass.quantization.layers", "fuse_pass.cli"])
def test_an_import_loads_neither(name: str) -> None:
    assert run(f"import {name}; print(loaded())") == ["[]"]


def test_layers_run_eagerly_with_neither() -> None:
    """Every layer forward and backward, conversion there and back, and its report.

    Not second derivatives, for which `torch.func.vjp` loads Dynamo, nor calibration, for which `set_stance` does.
    """
    program = """
import torch
from torch import Tensor, nn
import fuse_pass
from tests.quantization.samples import SAMPLES

def step(layer, inputs, options):
    results = layer(*inputs, **options)
    results = [y for y in (results if isinstance(results, tuple) else (results,)) if isinstance(y, Tensor)]
    wanted = [tensor for tensor in (*inputs, *layer.parameters()) if tensor.requires_grad]
    loss = sum((y.float() ** 2).sum() for y in results if y.requires_grad)
    torch.autograd.grad(loss, wanted, allow_unused=True)

ran = 0
with fuse_pass.collect() as report:
    for spec in ("fp8_e4m3", "int8"):
        for sample in SAMPLES:
            step(fuse_pass.convert(sample.layer(), {sample.type: spec}), sample.inputs(), sample.call)
            assert not loaded(), (sample, loaded())
            ran += 1
x = torch.randn(64, 256, requires_grad=True)
for layer in (
    fuse_pass.FusedDenseGELUDense(256, 1024),
    fuse_pass.FusedDropoutLayerNorm(256),
    fuse_pass.BitLinear(256, 256),
    fuse_pass.convert(nn.Linear(256, 256), "llm_int8"),
):
    step(layer, (x,), {})
    with torch.no_grad():
        layer.eval()(x[:1])
    assert not loaded(), (layer, loaded())
    ran += 1
model = fuse_pass.convert(nn.Sequential(nn.Linear(8, 8), nn.GELU()), "int8")
fuse_pass.convert(model, None)
str(report)
print(loaded(), ran == 2 * len(SAMPLES) + 4, len(report.matches) == 2 * len(SAMPLES))
"""
    assert run(program) == ["[] True True"]


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["coverage", "--format"], ["no-command"]])
def test_the_command_line_is_read_with_neither(arguments: list[str]) -> None:
    program = f"""
from fuse_pass.cli import main
try:
    main({arguments})
except SystemExit as stop:
    print(loaded(), stop.code)
"""
    assert run(program)[-1] == f"[] {0 if '--help' in arguments else 2}"


def test_names_that_need_them_load_them() -> None:
    program = """
import fuse_pass
names = dir(fuse_pass)
print(loaded(), {"compile", "coverage", "FuseBackend", "fuse_backend"} < set(names), names == dir(fuse_pass))
from fuse_pass import *
from fuse_pass import coverage as by_import
print(loaded(), compile is fuse_pass.compile, coverage is by_import, isinstance(fuse_backend, FuseBackend))
print(fuse_pass.backend.fuse_backend is fuse_backend, fuse_pass.patterns.PATTERNS[0].name)
print(hasattr(fuse_pass, "no_such_name"), dir(fuse_pass) == names)
try:
    fuse_pass.no_such_name
except AttributeError as error:
    print(error)
"""
    assert run(program) == [
        "[] True True",
        "['torch._dynamo', 'torch._inductor'] True True True",
        "True gated_dense",
        "False True",
        "module 'fuse_pass' has no attribute 'no_such_name'",
    ]


def test_type_checkers_see_every_name() -> None:
    """They do not run `__getattr__`: each name is bound by an import at the top of the file."""
    tree = ast.parse(Path(fuse_pass.__file__).read_text())
    bound = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(fuse_pass.__all__) <= bound


def test_modules_without_our_backend() -> None:
    """Stock Inductor sees into our ops, though they were defined before it was loaded."""
    program = """
import torch, fuse_pass
layer = fuse_pass.FusedDenseGELUDense(8, 24)
norm = fuse_pass.FusedDropoutLayerNorm(8, dropout=0.5)
print(loaded())
from torch._inductor.utils import run_and_get_code
from torch._inductor import config, decomposition
x = torch.randn(4, 8)
with config.patch(force_disable_caches=True):
    compiled = torch.compile(lambda x: norm(layer(x)))
    _, code = run_and_get_code(lambda: compiled(x).sum().backward())
print("ops.fuse_pass." in "".join(code), len(code), all(parameter.grad is not None for parameter in layer.parameters()))
print(torch.ops.fuse_pass.dropout_norm.default in decomposition.select_decomp_table())
print([name for name in sys.modules if name in ("fuse_pass.backend", "fuse_pass.inductor.compiler")])
"""
    assert run(program) == ["[]", "False 2 True", "True", "[]"]


def test_draws_are_not_merged_without_our_backend() -> None:
    program = """
import torch, fuse_pass
norms = torch.nn.ModuleList(fuse_pass.FusedDropoutLayerNorm(512, dropout=0.5, bias=False) for _ in range(2))
x = torch.ones(4, 512, requires_grad=True)
print(loaded())
y, z = torch.compile(lambda x: (norms[0](x), norms[1](x)), backend="aot_eager_decomp_partition")(x)
print(torch.equal(y, z), abs(float((y > 0).float().mean()) - 0.5) < 0.1)
"""
    assert run(program) == ["[]", "False True"]


def test_dynamo_has_our_backend_in_its_list_once_it_has_compiled() -> None:
    """Of such backends it lets go of a model's tensors, without which `swap_tensors` fails."""
    program = """
import torch, fuse_pass
from torch._dynamo.backends import registry
torch.compile(torch.nn.Linear(3, 3), backend=fuse_pass.fuse_backend)(torch.ones(2, 3))
print(fuse_pass.fuse_backend in registry._COMPILER_FNS.values())
print(registry._is_registered_backend(fuse_pass.fuse_backend))
"""
    assert run(program) == ["True", "True"]
