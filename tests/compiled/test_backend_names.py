"""`backend="fuse_pass"`, from an installed package and from a bare source tree, whatever is imported first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fuse_pass

ENTRY_POINTS = "[torch_dynamo_backends]\nfuse_pass = fuse_pass.backend:fuse_backend\n"
# Each begins before Dynamo is loaded.
COLD_CASES = {
    "source tree, import before Dynamo": (False, "import", "Dynamo", "fuse_pass"),
    "source tree, Dynamo by the other name": (False, "import", "fuse_pass_backend"),
    "installed, import before Dynamo": (True, "import", "Dynamo", "list", "fuse_pass"),
    "source tree, object first": (False, "import", "object", "fuse_pass"),
}
# Each begins when it is.
CASES = {
    "source tree": (False, "import", "fuse_pass"),
    "source tree, after a look at what is installed": (False, "list", "import", "fuse_pass"),
    "installed, import first": (True, "import", "fuse_pass"),
    "installed, name first": (True, "fuse_pass", "import"),
    "installed, import after a look at what is installed": (True, "list", "import", "fuse_pass"),
}
# Each case in a process of its own, forked where torch is imported and nothing more, or Dynamo too. What is installed
# beside the tests is hidden, and the entry point of a folder is there where it is wanted.
PROGRAM = """
import importlib.metadata as metadata, json, os, pathlib, sys
import torch

def run(is_installed, *steps):
    found = metadata.entry_points
    def entry_points(**selection):
        if selection.get("group") != "torch_dynamo_backends":
            return found(**selection)
        group = [entry for entry in found(**selection) if not entry.value.startswith("fuse_pass")]
        if is_installed:
            group += metadata.Distribution.at(pathlib.Path(sys.argv[1])).entry_points.select(**selection)
        return metadata.EntryPoints(group)
    metadata.entry_points = entry_points
    for step in steps:
        if step == "import":
            import fuse_pass
        elif step == "Dynamo":
            assert "torch._dynamo" not in sys.modules
            torch._dynamo.reset()
        elif step == "object":
            torch.compile(torch.sin, backend=fuse_pass.fuse_backend)(torch.ones(2))
        elif step == "list":
            assert ("fuse_pass" in torch._dynamo.list_backends()) == (is_installed or "fuse_pass" in sys.modules)
        else:
            torch.compile(torch.sin, backend=step)
    from torch._dynamo.backends.registry import lookup_backend
    assert lookup_backend("fuse_pass") is lookup_backend("fuse_pass_backend") is fuse_pass.fuse_backend
    assert "fuse_pass" in torch._dynamo.list_backends()

def failing(cases):
    for name, case in cases.items():
        child = os.fork()
        if child == 0:
            run(*case)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            yield name

cold, others = map(json.loads, sys.argv[2:])
failed = [*failing(cold)]
import torch._dynamo
print(json.dumps([*failed, *failing(others)]))
"""


def test_the_name_is_known(tmp_path: Path) -> None:
    metadata = tmp_path / "fuse_pass-0.dist-info"
    metadata.mkdir()
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    environment = {**os.environ, "PYTHONPATH": str(Path(fuse_pass.__file__).parents[1])}
    command = [sys.executable, "-c", PROGRAM, str(metadata), json.dumps(COLD_CASES), json.dumps(CASES)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr


def test_the_entry_point_is_that_of_the_package() -> None:
    text = (Path(fuse_pass.__file__).parents[1] / "pyproject.toml").read_text()
    section = text[text.index("torch_dynamo_backends") :].split("\n\n")[0]
    assert section == 'torch_dynamo_backends]\nfuse_pass = "fuse_pass.backend:fuse_backend"'
