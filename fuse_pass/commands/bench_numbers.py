"""The rows of `bench` about number formats: what fake quantisation costs, against doing without it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fuse_pass.backend import FuseBackend
from fuse_pass.commands.bench_models import Block, step
from fuse_pass.quantize import fake_quantize

# Not a power of two: with 4 × 2^20 elements input and output may lie 4 KiB apart, which costs some kernels half their
# speed and others nothing.
_ELEMENTS = 4 * 1024 * 1024 + 5136


@dataclass(frozen=True)
class Cost:
    """One line: what is measured, and what it is measured against.

    Attributes:
        title: what is measured.
        baseline: what it is compared with.
        build: the two calls, ours and the baseline.
        needs: a package without which there is no baseline.
    """

    title: str
    baseline: str
    build: Callable[[str], tuple[Callable[[], object], Callable[[], object]]]
    needs: str | None = None

    @property
    def is_available(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def _alone(fmt: str, rounding: str = "nearest") -> Cost:
    def build(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
        x = torch.randn(_ELEMENTS, device=device)
        ours = torch.compile(lambda x: fake_quantize(x, fmt, rounding=rounding))
        copied = torch.compile(lambda x: x * 2)
        return lambda: ours(x), lambda: copied(x)

    return Cost(f"fake_quantize {fmt} {rounding}, {_ELEMENTS / 1e6:.1f} M float32", "x * 2", build)


def _against_pychop() -> Cost:
    def build(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
        from pychop import Chop

        x = torch.randn(_ELEMENTS, device=device)
        ours = torch.compile(lambda x: fake_quantize(x, "fp8_e5m2"))
        theirs = Chop(exp_bits=5, sig_bits=2, rmode=1)
        return lambda: ours(x), lambda: theirs(x)

    return Cost("fake_quantize fp8_e5m2 nearest", "pychop", build, needs="pychop")


def _training(fmt: str) -> Cost:
    def build(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
        model = nn.Sequential(*(Block(384, 12, 0.0) for _ in range(4))).to(device)
        inputs: list[Tensor] = [torch.randn(4, 128, 384, device=device, requires_grad=True)]
        quantised = torch.compile(copy.deepcopy(model), backend=FuseBackend(quantize=fmt))
        plain = torch.compile(model, backend=FuseBackend())
        return step(quantised, inputs, train=True), step(plain, inputs, train=True)

    return Cost(f"training step in {fmt}, 4 transformer blocks [4×128×384]", "the same in float32", build)


COSTS = (
    _alone("fp8_e4m3"),
    _alone("fp8_e5m2"),
    _alone("fp8_e4m3", "stoc_prop"),
    _alone("bf16"),
    _alone("int8"),
    _alone("mxfp4"),
    _against_pychop(),
    _training("fp8_e4m3"),
)
