"""Which level of the kernels is compiled, and by a compiler that does not know all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuse_pass.inductor.cpp_compiler import cpp_compiler
from fuse_pass.kernels import build


def test_an_old_compiler_compiles_a_lower_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpp_compiler()
    if real is None:
        pytest.skip("there is no C++ compiler")
    old, log = tmp_path / "compiler", tmp_path / "log"
    old.write_text(f"""#!/bin/sh
echo "$*" >> {log}
case "$*" in *-mamx*|*-mavx512*) echo "unknown option" >&2; exit 1;; esac
exec {real} "$@"
""")
    old.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "cpp_compiler", lambda: str(old))
    monkeypatch.setattr(build, "level", lambda: 3)
    assert build.load() is not None
    tried = [line.partition("-DLEVEL=")[2][:1] for line in log.read_text().splitlines() if "-DLEVEL" in line]
    assert tried == ["3", "2", "1"]


@pytest.mark.parametrize("allowed", [True, False])
def test_tiles_are_used_where_linux_gives_them(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(build, "instructions", lambda: frozenset().union(*build._LEVELS.values()))
    monkeypatch.setattr(build, "may_use_tiles", lambda: allowed)
    assert build.level() == (3 if allowed else 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert build.level() == 1
