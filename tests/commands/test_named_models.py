"""Models named as package.module:function, and what is said where that does not work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fuse_pass.commands.errors import CommandError
from fuse_pass.commands.named_models import Example, example_of, reports

SOURCE = """
import torch
from torch import nn

def build():
    return nn.Linear(4, 5), (torch.ones(3, 4),)

def bare():
    return nn.Linear(4, 5), torch.ones(3, 4)

def named():
    return nn.Linear(4, 5), (), {"input": torch.ones(3, 4)}

def needs(width):
    return nn.Linear(width, 5), torch.ones(3, width)

def optional(width=4):
    return nn.Linear(width, 5), torch.ones(3, width)

model_only = lambda: nn.Linear(4, 5)
swapped = lambda: (torch.ones(3, 4), nn.Linear(4, 5))
four = lambda: (nn.Linear(4, 5), (), {}, 1)
bad_kwargs = lambda: (nn.Linear(4, 5), (), [1])
bad_keys = lambda: (nn.Linear(4, 5), (), {1: 2})
value = 3
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_models_sample.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "named_models_sample", raising=False)


@pytest.mark.parametrize("function", ["build", "bare", "named", "optional"])
def test_model_with_its_inputs(function: str) -> None:
    example = example_of(f"named_models_sample:{function}")
    assert isinstance(example, Example)
    assert example.model(*example.args, **example.kwargs).shape == (3, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("named_models_sample", "expected package.module:function, got 'named_models_sample'; write for instance"),
        (":build", "expected package.module:function, got ':build'"),
        ("named_models_sample:", "expected package.module:function"),
        ("no_such_module:build", "cannot load 'no_such_module:build': No module named 'no_such_module'; modules are"),
        ("named_models_sample:absent", "cannot load 'named_models_sample:absent'.*has no attribute 'absent'"),
        ("named_models_sample:value", "expected a function, got int"),
        ("named_models_sample:needs", "without required arguments.*'width'.*wrap it"),
        ("named_models_sample:model_only", r"expected a tuple \(nn.Module, args\) or .*, got Linear"),
        ("named_models_sample:swapped", r"got \(Tensor, Linear\)"),
        ("named_models_sample:four", r"got \(Linear, tuple, dict, int\)"),
        ("named_models_sample:bad_kwargs", r"got \(Linear, tuple, list\); kwargs is a dict with names as keys"),
        ("named_models_sample:bad_keys", "kwargs is a dict with names as keys"),
    ],
)
def test_mistakes_say_what_was_expected(name: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        example_of(name)


def test_keyword_inputs_reach_the_report() -> None:
    (train, evaluation) = reports(["named_models_sample:named"])
    assert (train[1], evaluation[1]) == ("train", "eval")
    assert train[2].graphs == evaluation[2].graphs == 1
    assert torch.is_grad_enabled(), "as it was before"
