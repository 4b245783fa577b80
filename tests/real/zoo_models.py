"""The models of `tests/data/zoo`: architectures of transformers, timm and torch.nn, tiny and with random weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ZOO = Path(__file__).parents[1] / "data" / "zoo"


def load_zoo() -> Any:
    specification = importlib.util.spec_from_file_location("zoo", ZOO / "zoo.py")
    assert specification is not None
    assert specification.loader is not None
    zoo = importlib.util.module_from_spec(specification)
    before = list(sys.path)
    specification.loader.exec_module(zoo)
    # The stand-in for torchvision must not hide a real one.
    sys.path[:] = [*before, *(path for path in sys.path if path not in before)]
    return zoo


zoo = load_zoo()


def build(name: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    family = zoo._EXPECTED[name]["family"]
    if family != "nn":
        pytest.importorskip({"hf": "transformers", "timm": "timm"}[family])
    return zoo.build(name)  # type: ignore[no-any-return]
