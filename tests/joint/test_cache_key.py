"""The identity of what we compile: changes with everything that changes the result, and with nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from fuse_pass.gemm import measured, onednn
from fuse_pass.inductor import compat
from fuse_pass.joint import cache_key as module
from fuse_pass.joint.cache_key import OnThisProcessor, cache_key, source_hash

OPTIONS = {"patterns": ("dense_act_dense", "dropout_norm"), "strict": False}


@pytest.fixture(autouse=True)
def fixed_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(measured, "table", lambda: {"float32": 1 << 20})
    source_hash.cache_clear()
    yield
    source_hash.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that may be edited."""
    copy = tmp_path / "fuse_pass"
    shutil.copytree(module.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "PACKAGE", copy)
    return copy


def key_now() -> bytes:
    source_hash.cache_clear()
    return cache_key(OPTIONS)


def test_package_is_the_whole_package() -> None:
    assert module.PACKAGE.name == "fuse_pass"
    assert (module.PACKAGE / "backend.py").exists()


def test_a_copy_elsewhere_has_the_same_key(package: Path) -> None:
    copied = key_now()
    module.PACKAGE = Path(measured.__file__).resolve().parents[1]
    assert key_now() == copied


def test_key_is_a_function_of_its_options() -> None:
    assert cache_key(OPTIONS) == cache_key(dict(reversed(OPTIONS.items())))
    keys = {
        cache_key(OPTIONS),
        cache_key(OPTIONS | {"strict": True}),
        cache_key(OPTIONS | {"patterns": ("dropout_norm",)}),
        cache_key(OPTIONS | {"patterns": ()}),
        cache_key(OPTIONS | {"patterns": ("dropout_norm", "dense_act_dense")}),
        cache_key(OPTIONS | {"more": None}),
        cache_key({}),
    }
    assert len(keys) == 7


def test_a_number_is_not_its_text() -> None:
    assert cache_key({"a": 1}) != cache_key({"a": "1"})


def test_key_changes_with_the_gemm_table(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {cache_key(OPTIONS)}
    for table in ({}, {"float32": 1 << 21}, {"bfloat16": 1 << 20}):
        monkeypatch.setattr(measured, "table", lambda table=table: table)
        keys.add(cache_key(OPTIONS))
    assert len(keys) == 4


OTHER_PROCESSORS: dict[str, tuple[object, str, object]] = {
    "another of its name": (module, "processor", lambda: "AMD EPYC, 23, 49, avx2"),
    "narrower vectors in PyTorch": (module, "instruction_set", lambda: "SIMD77"),
    "narrower vectors in Inductor": (compat, "vector_instructions", lambda: "simd77"),
    "no oneDNN": (compat, "onednn_linear", lambda: None),
    "half types the other way": (compat, "has_fast_cpu_dtype", lambda dtype: not HAS_BFLOAT16),
    "a product that has failed": (onednn, "_failed", {torch.float32}),
}
HAS_BFLOAT16 = compat.has_fast_cpu_dtype(torch.bfloat16)


@pytest.mark.processor
@pytest.mark.parametrize("other", OTHER_PROCESSORS)
def test_key_changes_with_the_processor(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of one is wrong on the other, and nothing else tells them apart."""
    ours, stock = cache_key(OPTIONS), OnThisProcessor().uuid()
    monkeypatch.setattr(*OTHER_PROCESSORS[other])
    assert cache_key(OPTIONS) != ours
    assert OnThisProcessor().uuid() != stock
    monkeypatch.undo()
    assert OnThisProcessor().uuid() == stock


class Known(CustomGraphPass):
    def __call__(self, graph: Graph) -> None:
        graph.owning_module = "seen"

    def uuid(self) -> str:
        return "known"


def test_the_passes_of_the_user_run_and_count() -> None:
    graph, stock = Graph(), OnThisProcessor().uuid()
    OnThisProcessor([Known()])(graph)
    assert graph.owning_module == "seen"
    assert OnThisProcessor([Known()]).uuid() not in (None, stock)
    assert OnThisProcessor([Known(), lambda graph: None]).uuid() is None, "not to be cached"


def test_key_changes_with_any_source(package: Path) -> None:
    keys = {key_now()}
    paths = sorted(package.rglob("*.py"))
    for path in paths:
        path.write_text(path.read_text() + "# changed\n")
        keys.add(key_now())
    assert len(keys) == len(paths) + 1


def test_key_changes_when_a_source_comes_goes_or_moves(package: Path) -> None:
    keys = [key_now()]
    added = package / "ops" / "added.py"
    added.write_text("")
    keys.append(key_now())
    added.rename(package / "patterns" / "added.py")
    keys.append(key_now())
    (package / "patterns" / "added.py").unlink()
    keys.append(key_now())
    assert len(set(keys[:3])) == 3
    assert keys[3] == keys[0]


def test_text_that_moves_to_the_next_file_changes_the_key(package: Path) -> None:
    """Names and contents are told apart: `a.py` + `b` is not `a` + `.pyb`."""
    (package / "a.py").write_text("one\n")
    (package / "b.py").write_text("two\n")
    before = key_now()
    (package / "a.py").write_text("one\ntwo\n")
    (package / "b.py").write_text("")
    assert key_now() != before


def test_compiled_files_do_not_matter(package: Path) -> None:
    before = key_now()
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "backend.cpython-311.pyc").write_bytes(b"x")
    assert key_now() == before


def test_key_is_the_same_in_another_process(tmp_path: Path) -> None:
    """Hash randomisation of strings must not enter it."""
    program = (
        "from fuse_pass.gemm import measured; measured.table = lambda: {'float32': 1 << 20}\n"
        "from fuse_pass.joint.cache_key import cache_key\n"
        f"print(cache_key({OPTIONS!r}).hex())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=module.PACKAGE.parent
    )
    assert result.stdout.strip() == cache_key(OPTIONS).hex()
