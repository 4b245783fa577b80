"""Programs that the fuzzer once found to be wrong, made small."""

from __future__ import annotations

import functools

import pytest
import torch

from fuse_pass.backend import FuseBackend
from fuse_pass.gemm import measured, probe
from fuse_pass.testing.centred import CentredNorms
from fuse_pass.testing.compare import Status, check
from fuse_pass.testing.program import Input, Program, Settings, Statement

MEMBERS = {
    "norm": "self.norm = nn.LayerNorm(24)",
    "layer": "self.layer = nn.TransformerEncoderLayer(24, 4, 16, batch_first=True)",
    "up": "self.up = nn.Linear(24, 16)",
    "rms_norm": "self.rms_norm = nn.RMSNorm(24)",
    "down": "self.down = nn.Linear(16, 24)",
    "frozen": "self.frozen = nn.Linear(24, 16).requires_grad_(False)",
    "frozen_down": "self.frozen_down = nn.Linear(16, 24)",
    "to_nothing": "self.to_nothing = nn.Linear(24, 0)",
    "scale": "self.scale = nn.Parameter(torch.empty(5))",
    "of_nothing": "self.of_nothing = nn.Linear(0, 24)",
}

# inputs need gradients, statements, outputs, settings, matches
PROGRAMS: dict[str, tuple[bool, tuple[str, ...], str, Settings, int]] = {
    "parameters of a norm that is only read detached have no gradient": (
        True,
        ("z = F.dropout(x0, 0.1)", "y = self.norm(z)", "v = torch.tanh(z)"),
        "v, y.detach()",
        Settings(),
        1,
    ),
    "a sum that is written to after a norm that nobody reads": (
        True,
        ("z = F.dropout(x0 * 1, 0.25)", "y = self.norm(z)", "z.add_(1)", "v = self.up(z)"),
        "v",
        Settings(),
        0,
    ),
    "a sum of frozen values needs no gradient": (
        False,
        ("z = F.dropout(x0, 0.5)", "y = self.norm(z)"),
        "y, z",
        Settings(),
        1,
    ),
    "an input that is written to after a frozen Linear": (
        True,
        ("x = x0 * 1", "y = self.frozen_down(F.gelu(self.frozen(x)))", "x.view(-1, 24).add_(1)"),
        "y",
        Settings(),
        0,
    ),
    "the beginning of a chain that is written to": (
        True,
        ("x = self.down(F.gelu(self.up(x0)))", "y = self.down(self.up(F.relu(x)))", "x.view(-1, 24).add_(1)"),
        "y",
        Settings(),
        1,
    ),
    "a sum that is written to after its RMSNorm": (
        False,
        ("z = F.dropout(x0 * 1, 0.25)", "y = self.rms_norm(z)", "z.add_(1)"),
        "y",
        Settings(),
        0,
    ),
    "no hidden features": (
        True,
        ("y = self.of_nothing(F.gelu(self.to_nothing(x0)))",),
        "y",
        Settings(),
        1,
    ),
    "a checkpoint in an autocast region": (
        True,
        (
            'with torch.autocast("cpu", torch.bfloat16):',
            "    y = checkpoint(lambda t: self.down(F.gelu(self.up(t))), x0, use_reentrant=False)",
        ),
        "y",
        Settings(),
        1,
    ),
    "an infinity in a written-out GELU in bfloat16": (
        True,
        (
            "h = self.up(x0[1:])",
            "a = 0.5 * h * (1.0 + torch.erf(h * 0.7071067811865476))",
            "y = self.down(a)",
        ),
        "y",
        Settings(dtype="bfloat16", special=True),
        1,
    ),
    "a gradient in float64 that is nothing but rounding": (
        True,
        (
            "v = (x0 - x0.mean(1, keepdim=True)) / torch.sqrt(x0.var(1, keepdim=True)) * self.scale[:, None]",
            "y = self.rms_norm(v + v)",
        ),
        "y",
        Settings(seed=3, dtype="float64", training=False),
        1,
    ),
    "a transposed norm of no rows": (
        True,
        ("z = F.dropout(x0[:0]) + x0[:0]", "y = self.norm(z.transpose(0, 1)).transpose(0, 1)"),
        "y",
        Settings(),
        1,
    ),
    "an input that is written to where little may be kept": (
        True,
        ("x0 *= 1.5", "z = F.dropout(x0, 0.25)", "y = self.norm(z)"),
        "y",
        Settings(budget=0.5),
        1,
    ),
    "tiny rows": (
        True,
        ("z = x0 * 1e-41", "y = self.norm(z + z)"),
        "y",
        Settings(),
        1,
    ),
    "a norm of the result of a norm that ends in a cast": (
        True,
        (
            "z = F.dropout(x0, 0.25) + x0",
            "h = (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, unbiased=False, keepdim=True) + 1e-5)",
            "v = (h * self.norm.weight + self.norm.bias).to(torch.float32)",
            "y = F.layer_norm(v, (24,))",
        ),
        "y, v",
        Settings(),
        1,
    ),
    "a checkpoint of an input that was written to, on a budget": (
        True,
        ("x0.add_(1)", "y = checkpoint(lambda x: self.norm(F.dropout(x, 0.25)), x0, use_reentrant=False)"),
        "y",
        Settings(budget=0.5),
        0,
    ),
    "a checkpoint of a value that was written to, on a budget": (
        True,
        ("z = x0 * 1", "z.add_(1)", "y = checkpoint(lambda x: self.norm(F.dropout(x, 0.25)), z, use_reentrant=False)"),
        "y",
        Settings(budget=0.5),
        1,
    ),
    "constant rows": (
        True,
        ("z = x0 * 0 + 0.2", "y = self.norm(z + z)"),
        "y",
        Settings(),
        1,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_stays_right(name: str) -> None:
    requires_grad, lines, outputs, settings, matches = PROGRAMS[name]
    program = Program(
        (Input("x0", (3, 5, 24), requires_grad),), (Statement("", lines),), (outputs,), MEMBERS, {}, settings
    )
    verdict = check(program.text())
    assert verdict.status is Status.RIGHT, str(verdict)
    assert verdict.report.counts().total() == matches


def test_attention_that_is_opened_draws_the_mask_of_the_tester(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = functools.partialmethod(FuseBackend.rewrite, pays=lambda problem: True)
    monkeypatch.setattr(FuseBackend, "rewrite", everything)
    program = Program((Input("x0", (3, 5, 24), True),), (Statement("", ("y = self.layer(x0)",)),), ("y",), MEMBERS, {})
    verdict = check(program.text())
    assert verdict.status is Status.RIGHT, str(verdict)
    assert verdict.report.counts() == {"dense_act_dense": 1, "dropout_norm": 2, "dense": 2}


WRITES_AFTER_READING = """
import torch
from torch import nn

INPUTS = [((3, 5, 24), False)]
SETTINGS = {"seed": 0, "dtype": "float32", "training": True, "grad": True, "dynamic": False, "autocast": False,
            "special": False, "fallback_random": False, "rows": "", "budget": 0.2}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(24), nn.Dropout(0.25)

    def forward(self, x0):
        y = self.norm(self.drop(x0) + x0)
        x0[..., :2] = 0
        return y
"""


def test_an_input_that_is_kept_and_written_to_is_the_partitioner_s_fault() -> None:
    verdict = check(WRITES_AFTER_READING)
    assert verdict.status in (Status.RIGHT, Status.AS_STOCK), str(verdict)


CONSTANT_ROWS_TWICE_MULTIPLIED = """
import torch
import torch.nn.functional as F
from torch import nn

INPUTS = [((3, 5, 1000), False)]
SETTINGS = {"seed": 6001022, "dtype": "float32", "training": False, "grad": True, "dynamic": False, "autocast": False,
            "special": False, "fallback_random": False, "rows": "constant", "budget": 1.0}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1000), requires_grad=False)
        self.linear6 = nn.Linear(1000, 1000, bias=False)

    def forward(self, x0):
        sums = x0 + F.dropout(x0, 0.5)
        y = F.layer_norm(sums, (1000,), self.scale * torch.tanh(sums[0, 0]), self.scale)
        return self.linear6(F.selu(self.linear6(y) * 1.5))
"""


def test_the_other_library_s_order_of_summation_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN errs four times as much as MKL in a product of such rows; both are eager PyTorch's."""
    monkeypatch.setattr(measured, "table", lambda: {"float32": probe.MIN_FLOP})
    verdict = check(CONSTANT_ROWS_TWICE_MULTIPLIED)
    assert verdict.status is Status.RIGHT, str(verdict)


CONSTANT_ROWS_OF_1E12 = """
import torch
import torch.nn.functional as F
from torch import nn

INPUTS = [((3, 5, 8), True)]
SETTINGS = {
    "seed": 33002965, "dtype": "float32", "training": True, "grad": True, "dynamic": False, "autocast": False,
    "special": False, "fallback_random": False, "rows": "constant", "budget": 1.0,
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout2 = nn.Dropout(0.25)
        self.w5 = nn.Parameter(torch.empty(8))

    def forward(self, x0):
        v1 = x0 * x0
        v3 = self.dropout2(x0)
        v4 = v1.add(v3)
        v9 = F.layer_norm(v4, (8,), self.w5, None, 1e-12)
        v10 = v4 + torch.tanh(v9)
        v3.add_(v4.detach())
        return v10
"""


def test_gradients_that_pytorch_loses_to_cancellation_are_no_fault() -> None:
    """Its gradient of a norm of constant rows of 1e12 is 0, in float64 too, and ours what the formula gives."""
    verdict = check(CONSTANT_ROWS_OF_1E12)
    assert verdict.status in (Status.RIGHT, Status.NOISE), str(verdict)


@pytest.mark.parametrize("magnitude", [1.0, 1e3, 1e12])
def test_centred_norms_have_the_gradients_of_the_formula(magnitude: float) -> None:
    """Autograd of the steps of a norm, whose mean of a constant row of eight is exact here."""
    x = (torch.randint(-3, 4, (4, 8)) + magnitude).double()
    x[1] = magnitude
    weight, grad = torch.rand(8, dtype=torch.float64).requires_grad_(), torch.randn(4, 8, dtype=torch.float64)
    x.requires_grad_()
    centred = x - x.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-12) * weight
    expected = torch.autograd.grad(y, (x, weight), grad)
    with CentredNorms():
        found = torch.nn.functional.layer_norm(x, (8,), weight, None, 1e-12)
        gradients = torch.autograd.grad(found, (x, weight), grad)
    torch.testing.assert_close(found, y, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
