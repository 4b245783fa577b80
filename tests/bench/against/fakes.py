"""Contenders of our own making, and a small task for them."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fuse_pass.bench.against.contender import FLOAT, INT8, Built, Contender, Task, under_no_grad
from fuse_pass.bench.models import mlp
from fuse_pass.commands.named_models import Example

ROWS, DIM, HIDDEN = 5, 24, 40


def task(kind: str = FLOAT, dtype: torch.dtype = torch.float32, threads: int = 1) -> Task:
    torch.manual_seed(0)
    return Task(Example(mlp(DIM, HIDDEN).to(dtype).eval(), (torch.randn(ROWS, DIM, dtype=dtype),)), kind, threads)


def as_it_is(asked: Task) -> Built:
    return Built(under_no_grad(asked.example.model, asked.example))


def off_by(share: float) -> Callable[[Task], Built]:
    """Results that are too large by a share."""

    def build(asked: Task) -> Built:
        call = under_no_grad(asked.example.model, asked.example)
        return Built(lambda: call() * (1 + share))

    return build


def first_row_only(asked: Task) -> Built:
    call = under_no_grad(asked.example.model, asked.example)
    return Built(lambda: call()[:1])


def in_another_thread(asked: Task) -> Built:
    call = under_no_grad(copy.deepcopy(asked.example.model), asked.example)

    def run() -> Tensor:
        results: list[Tensor] = []

        def work() -> None:
            end = time.thread_time() + 0.005
            while time.thread_time() < end:
                pass
            results.append(call())

        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        return results[0]

    return Built(run)


def failing(asked: Task) -> Built:
    raise RuntimeError("\n  no kernel for this\nand a page more")


def contender(build: Callable[[Task], Built], kind: str = FLOAT, name: str = "fake") -> Contender:
    return Contender(name, (), "fake", {kind: build})


INT8_OF_1_PERCENT = contender(off_by(0.01), INT8)
