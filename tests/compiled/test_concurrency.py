"""Several threads that compile at once, and several processes on one cold cache, get right results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuse_pass
from fuse_pass.testing import levels

THREADS, PROCESSES = 8, 4


class Block(nn.Module):
    """Models of different sizes and activations, so that no two threads compile the same."""

    def __init__(self, i: int) -> None:
        super().__init__()
        width = 8 + 2 * i
        self.up, self.down, self.norm = nn.Linear(width, 3 * width), nn.Linear(3 * width, width), nn.LayerNorm(width)
        self.activation = (F.gelu, F.relu, F.silu, F.mish)[i % 4]
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.activation(self.up(x))))


def compile_and_compare(i: int, level: str, barrier: threading.Barrier, found: dict[int, object]) -> None:
    try:
        generator = torch.Generator().manual_seed(i)
        model = Block(i).double()
        x = torch.randn(5, model.width, generator=generator, dtype=torch.float64)
        twin = x.clone().requires_grad_()
        x.requires_grad_()
        compiled = torch.compile(model, backend=levels.fused(level))
        barrier.wait(timeout=60)
        with fuse_pass.collect() as report:
            y = compiled(x)
        y.square().sum().backward()
        expected = model(twin)
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-11, atol=1e-11)
        found[i] = dict(report.counts())
    except Exception as failure:  # reported by the test, which runs in another thread
        found[i] = failure


def assert_threads_agree(level: str) -> None:
    barrier, found = threading.Barrier(THREADS), {}  # type: ignore[var-annotated]
    threads = [threading.Thread(target=compile_and_compare, args=(i, level, barrier, found)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: {"dense_act_dense": 1, "dropout_norm": 1} for i in range(THREADS)}


def test_threads_compile_different_models() -> None:
    assert_threads_agree("aot")


@pytest.mark.slow
def test_threads_compile_different_models_with_inductor() -> None:
    assert_threads_agree("inductor")


PROGRAM = """
import json, sys
import torch
import fuse_pass
from tests.compiled.test_concurrency import Block

torch.manual_seed(0)
model = Block(1)
x = torch.randn(5, model.width, requires_grad=True)
with fuse_pass.collect() as report:
    y = torch.compile(model, backend=fuse_pass.fuse_backend)(x)
y.square().sum().backward()
grad, x.grad = x.grad, None
expected = model(x)
expected.square().sum().backward()
torch.testing.assert_close(y, expected)
torch.testing.assert_close(grad, x.grad)
print(json.dumps([report.counts(), y.double().sum().item(), grad.double().norm().item()]))
"""


@pytest.mark.slow
def test_processes_share_a_cold_cache(tmp_path: Path) -> None:
    root = str(Path(fuse_pass.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=environment, cwd=root, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(PROCESSES)
    ]  # fmt: skip
    results = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(error for _, error in results)
    values = [json.loads(output.splitlines()[-1]) for output, _ in results]
    assert values[0][0] == {"dense_act_dense": 1, "dropout_norm": 1}
    assert values == [values[0]] * PROCESSES
