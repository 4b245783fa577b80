"""The house plan: imports go one way, private parts of PyTorch stay in one room, the door lists every public name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fuse_pass

PACKAGE = Path(fuse_pass.__file__).parent
# From the ground up: a room imports from those above it in this list.
ROOMS = (
    "inductor",  # private parts of PyTorch
    "report_groups",  # rows of layers that repeat
    "report_page",
    "report",  # what was fused and why not
    "numerics",  # exact arithmetic on tensors
    "graph",  # reading and writing Dynamo graphs
    "gemm",  # who multiplies
    "kernels",  # C++ for weights of few bits
    "ops",  # operators, one declaration each
    "joint",  # passes over the joint graph
    "quantization",  # functions, observers, calibration, conversion, layers
    "nn",  # the fused layers, and every layer's public name
    "patterns",  # what is found in graphs, and what takes its place
    "options",  # the settings of a compilation
    "backend",
    "calling",  # what surrounds every call of what is compiled
    "in_place",
    "api",
    "analysis",
    "export",
    "integrations",  # what other libraries are told of us
    "testing",  # the fuzzer
    "commands",
    "bench",  # measurements
    "cli",
    "__main__",
)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute here"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":  # the door
        return
    ours = {name.split(".")[1] for name in imported_modules(path) if name.startswith("fuse_pass.")} - {room}
    assert ours <= set(ROOMS[: ROOMS.index(room)])


def test_every_room_is_listed() -> None:
    assert {room_of(path) for path in FILES} == {*ROOMS, "__init__"}


def test_every_public_name_exists_and_is_listed() -> None:
    assert all(hasattr(fuse_pass, name) for name in fuse_pass.__all__)
    assert sorted(fuse_pass.__all__) == fuse_pass.__all__
    assert [name for name in dir(fuse_pass) if name != "__version__"] == fuse_pass.__all__
    assert {"fuse_backend", "FuseBackend", "compile", "collect", "coverage", "Report"} <= set(fuse_pass.__all__)


def test_import_needs_only_torch_and_tabulate() -> None:
    """Extras must stay extras: the package imports with every other third-party package hidden."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'tqdm', 'matplotlib', 'numpy.testing', 'hypothesis', 'scipy', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import importlib, fuse_pass\n"
        "from fuse_pass.commands.arguments import COMMANDS\n"
        "for command in COMMANDS:\n"
        "    importlib.import_module(command.module).run\n"
        "print(len([getattr(fuse_pass, name) for name in fuse_pass.__all__]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(fuse_pass.__all__)
