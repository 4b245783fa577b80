"""Reference models in plain torch.nn, one file each, with the number of fusions to expect in them.

Every file has a frozen config (small by default, so that compiling takes seconds; a classmethod gives the published
size), `CONFIG` (the small one), `build(config)`, `example_inputs(config, batch, seed=0)` (what forward takes, in order)
and `EXPECTED`: matches per pattern in training and in evaluation. To add one, write its file and add it to `NAMES`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES: tuple[str, ...] = (
    "bert",
    "classifier",
    "convnext",
    "gpt2",
    "gru_seq2seq",
    "llama",
    "lstm_lm",
    "mlp_mixer",
    "resnet",
    "t5",
    "vit",
    "whisper",
)


def load(name: str) -> ModuleType:
    """Imports one reference model by its name in `NAMES`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown reference model {name!r}; valid names are {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{name}")
