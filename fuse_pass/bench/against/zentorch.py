"""zentorch, AMD's backend for `torch.compile`; each of its releases is made for one release of PyTorch."""

from __future__ import annotations

import copy
import importlib

import torch

from fuse_pass.bench.against.contender import FLOAT, Built, Contender, Task, under_no_grad
from fuse_pass.bench.contenders import own_function


def _float(task: Task) -> Built:
    importlib.import_module("zentorch")  # which registers the backend, and changes parts of PyTorch
    model = copy.deepcopy(task.example.model)
    return Built(under_no_grad(torch.compile(own_function(model), backend="zentorch"), task.example))


ZENTORCH = Contender("zentorch", ("zentorch",), "zentorch", {FLOAT: _float}, is_apart=True)
