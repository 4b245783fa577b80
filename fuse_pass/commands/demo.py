"""`demo`: a real sentence encoder by eager PyTorch, `torch.compile`, fuse_pass and with packed weights."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from fuse_pass.backend import fuse_backend
from fuse_pass.commands import sentence_encoder, timing
from fuse_pass.commands.errors import CommandError
from fuse_pass.commands.sentences import SENTENCES
from fuse_pass.quantization.pack import pack
from fuse_pass.report import collect

_EAGER, _STOCK, _OURS = "eager", "torch.compile", "fuse_pass"
_SPECS = ("int8", "int4_weight_only")
_SHOWN_SENTENCES = 5


def run(options: argparse.Namespace) -> None:
    if options.threads < 1:
        raise CommandError(f"--threads: expected 1 or more, got {options.threads}")
    model, tokens = _load()
    packed = {f"{_OURS}, {spec}": pack(model, spec) for spec in _SPECS}
    contenders: dict[str, Callable[..., Any]] = {
        _EAGER: model,
        _STOCK: torch.compile(model),
        **{name: torch.compile(net, backend=fuse_backend) for name, net in {_OURS: model, **packed}.items()},
    }
    embeddings, first_call = {}, {}
    reports = {}
    with torch.no_grad(), timing.threads(options.threads):
        for name, run_model in contenders.items():
            with _progress(f"{name}: first call"), collect() as reports[name]:
                start = time.perf_counter()
                embeddings[name] = _embed(run_model, tokens)
                first_call[name] = time.perf_counter() - start
        calls = {name: functools.partial(run_model, **tokens) for name, run_model in contenders.items()}
        print("measuring …", flush=True)
        with timing.pinned(options.threads):
            samples = timing.alternate(calls, options.seconds)
    print(f"\nWhat fuse_pass did\n\n{reports[_OURS]}\n")
    print(f"Nearest neighbours among {len(SENTENCES)} sentences\n\n{_neighbour_table(embeddings[_OURS])}\n")
    print(_comparison(embeddings, first_call, samples))
    print(f"\nPacked weights (fuse_pass.pack)\n\n{_size_table({_EAGER: model, **packed})}")
    print(f"\nMedians over alternating calls. Measured on {timing.described(timing.machine('cpu', options.threads))}.")


def _load() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model, tokens = sentence_encoder.load(SENTENCES)
    rows, columns = tokens["input_ids"].shape
    print(f"all-MiniLM-L6-v2: {rows} sentences, {columns} tokens each with padding")
    return model, tokens


def _embed(model: Callable[..., Any], tokens: dict[str, Tensor]) -> Tensor:
    """Mean over the tokens of each sentence, as the model was trained for; `[sentences, features]`, length 1."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def _neighbours(embeddings: Tensor) -> Tensor:
    """Index of the most similar other sentence, for each sentence."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-1).argmax(1)


def _neighbour_table(embeddings: Tensor) -> str:
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
    rows = []
    for i in range(0, len(SENTENCES), len(SENTENCES) // _SHOWN_SENTENCES):
        j = int(similarity[i].argmax())
        rows.append([SENTENCES[i], SENTENCES[j], f"{similarity[i, j]:.3f}"])
    return tabulate(rows, headers=["sentence", "nearest", "cosine"])


def _comparison(embeddings: dict[str, Tensor], first_call: dict[str, float], samples: dict[str, list[float]]) -> str:
    rows = []
    for name, values in embeddings.items():
        same = int((_neighbours(values) == _neighbours(embeddings[_EAGER])).sum())
        rows.append(
            [
                name,
                f"{same} of {len(values)}",
                f"{(values - embeddings[_EAGER]).abs().max():.1e}",
                f"{first_call[name]:.1f}",
                f"{statistics.median(samples[name]) * 1e3:.1f}",
                f"{timing.ratio(samples, name, _OURS):.2f}×",
            ]
        )
    headers = [
        "", "same neighbours", "largest difference", "first call (s)", "one call (ms)", "fuse_pass is faster by",
    ]  # fmt: skip
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *("right",) * 5))


def _size_table(models: dict[str, torch.nn.Module]) -> str:
    rows = []
    for name, model in models.items():
        held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        rows.append([name, f"{sum(held.values()) / 2**20:.1f}", f"{file.tell() / 2**20:.1f}"])
    return tabulate(rows, headers=["", "in memory (MiB)", "saved (MiB)"], disable_numparse=True)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """A line that counts the seconds while something long runs, such as a compilation."""
    from tqdm import tqdm

    done = threading.Event()
    with tqdm(bar_format="{desc} … {elapsed}", desc=what) as line:

        def tick() -> None:
            while not done.wait(0.5):
                line.refresh()

        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()
