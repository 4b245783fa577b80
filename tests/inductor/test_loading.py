"""What waits for a module is called once it is loaded, and nobody else notices."""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from fuse_pass.inductor import loading
from fuse_pass.inductor.loading import when_loaded

NAME = "fuse_pass_test_waited_for"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / f"{NAME}.py"
    for name in [name for name in sys.modules if name.startswith(NAME)]:
        del sys.modules[name]
    loading._waiting.pop(NAME, None)


def test_a_module_that_is_loaded_is_there_at_once() -> None:
    seen: list[ModuleType] = []
    when_loaded("json", seen.append)
    assert seen == [sys.modules["json"]]


def test_another_is_waited_for(file: Path) -> None:
    file.write_text("value = 1\n")
    seen: list[tuple[str, int]] = []
    when_loaded(NAME, lambda module: seen.append(("first", module.value)))
    when_loaded(NAME, lambda module: seen.append(("second", module.value)))
    assert not seen
    assert NAME not in sys.modules
    importlib.import_module(NAME)
    assert seen == [("first", 1), ("second", 1)], "in order, when the whole file has been run"
    importlib.reload(sys.modules[NAME])
    assert len(seen) == 2
    when_loaded(NAME, lambda module: seen.append(("third", module.value)))
    assert seen[2:] == [("third", 1)]


def test_the_module_is_as_if_nobody_had_waited(file: Path) -> None:
    file.write_text("def f():\n    return 1\n")
    when_loaded(NAME, lambda module: None)
    spec = importlib.util.find_spec(NAME)
    assert spec is not None
    assert spec.loader.get_source(NAME) == file.read_text()
    module = importlib.import_module(NAME)
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader
    assert inspect.getsource(module.f) == file.read_text()
    assert module.__file__ == str(file)


def test_a_package_and_its_parts(file: Path) -> None:
    package = file.with_suffix("")
    package.mkdir()
    (package / "__init__.py").write_text(f"from {NAME}.part import value\n")
    (package / "part.py").write_text("value = 1\n")
    seen: list[str] = []
    when_loaded(
        f"{NAME}.part", lambda module: seen.append(f"part {module.value} {hasattr(sys.modules[NAME], 'value')}")
    )
    when_loaded(NAME, lambda module: seen.append(f"package {module.value}"))
    importlib.import_module(NAME)
    assert seen == ["part 1 False", "package 1"], "the part while its package was half loaded"


def test_a_file_that_fails_is_waited_for_still(file: Path) -> None:
    file.write_text("raise ValueError\n")
    seen: list[int] = []
    when_loaded(NAME, lambda module: seen.append(module.value))
    with pytest.raises(ValueError):  # noqa: PT011 - the file's own
        importlib.import_module(NAME)
    assert not seen
    file.write_text("value = 12345\n")
    importlib.invalidate_caches()
    importlib.import_module(NAME)
    assert seen == [12345]


def test_a_module_that_nobody_finds() -> None:
    when_loaded(NAME, lambda module: None)
    try:
        assert importlib.util.find_spec(NAME) is None
        with pytest.raises(ModuleNotFoundError, match=NAME):
            importlib.import_module(NAME)
    finally:
        del loading._waiting[NAME]


def test_one_waits_while_the_module_is_being_loaded(file: Path) -> None:
    """A file that is half loaded lacks what is asked of it."""
    file.write_text(
        f"from fuse_pass.inductor.loading import when_loaded\n"
        f"when_loaded({NAME!r}, lambda module: seen.append(module.value))\nseen = []\nvalue = 1\n"
    )
    when_loaded(NAME, lambda module: module.seen.append("first"))
    assert importlib.import_module(NAME).seen == ["first", 1]


def test_another_thread_that_loads_the_module(file: Path) -> None:
    file.write_text("import time\ntime.sleep(0.2)\nvalue = 1\n")
    seen: list[int] = []
    thread = threading.Thread(target=importlib.import_module, args=(NAME,))
    thread.start()
    while NAME not in sys.modules:
        pass
    when_loaded(NAME, lambda module: seen.append(module.value))
    assert seen == [1]
    thread.join()
