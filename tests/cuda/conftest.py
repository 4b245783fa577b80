"""Runs each group of checks once, in a process where a CUDA device is pretended; the tests look at its rows."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda.support import hooks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes of this run of the tests."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cuda"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def library(shared_folder: Path) -> Path:
    """The hooks, compiled."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton: pip install 'fuse_pass[cuda-check]'")
    if torch.version.cuda is not None:
        pytest.skip("pretends a CUDA device for a build of PyTorch without CUDA; this one has it")
    if hooks.compiler() is None:
        pytest.skip("needs a C++ compiler: g++, or the one that CXX names")
    path = shared_folder / "hooks.so"
    with locked(shared_folder / "hooks.lock"):
        if not path.exists():
            hooks.build(path)
    return path


@pytest.fixture
def result(request: pytest.FixtureRequest, library: Path, shared_folder: Path) -> Any:
    """What the worker of this module's `GROUP` found for the parameter `case`."""
    group, case = request.module.GROUP, request.getfixturevalue("case")
    rows = shared_folder / f"{group}.jsonl"
    with locked(shared_folder / f"{group}.lock"):
        if not rows.exists():
            _run(library, group, rows, _chosen_cases(request.session, group))
    found = {row["case"]: row for row in map(json.loads, rows.read_text().splitlines())}
    if case not in found:
        log = rows.with_suffix(".log").read_text()[-4000:]
        pytest.fail(f"the process of group {group!r} ended before {case!r}:\n{log}")
    if "error" in found[case]:
        pytest.fail(found[case]["error"])
    return found[case]["result"]


def _chosen_cases(session: pytest.Session, group: str) -> list[str]:
    """Those of the tests that this run has selected."""
    of_group = [item for item in session.items if getattr(item.module, "GROUP", None) == group]  # type: ignore[attr-defined]
    return list(dict.fromkeys(item.callspec.params["case"] for item in of_group if hasattr(item, "callspec")))


def _run(library: Path, group: str, rows: Path, cases: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(rows.parent / "triton")}
    if group == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "tests.cuda.support.worker", str(library), group, str(rows), *cases]
    rows.touch()
    with rows.with_suffix(".log").open("w") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
