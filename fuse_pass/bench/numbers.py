"""The rows of `bench` about number formats: what fake quantisation costs, against doing without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse_pass.backend import FuseBackend
from fuse_pass.bench.contenders import Step, own_function, placed
from fuse_pass.bench.models import mlp
from fuse_pass.bench.rows import Row, bert
from fuse_pass.commands import timing
from fuse_pass.commands.named_models import Example
from fuse_pass.numerics.formats import Granularity, as_format
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.quantization.calibrate import calibrate
from fuse_pass.quantization.convert import convert
from fuse_pass.quantization.functional import fake_quantize
from fuse_pass.quantization.pack import pack

# Not a power of two: with 4 × 2^20 elements input and output may lie 4 KiB apart, which costs some kernels half their
# speed and others nothing.
_ELEMENTS = 4 * 1024 * 1024 + 5136


@dataclass(frozen=True)
class Cost:
    """One line: what is measured, and what it is measured against.

    Attributes:
        name: what is measured.
        baseline: what it is compared with.
        build: the two calls, ours and the baseline.
        needs: modules without which there is no baseline.
        rounds: the fewest to measure.
        is_reference: whether it is made of a reference model, which only a checkout has.
    """

    name: str
    baseline: str
    build: Callable[[str], tuple[Callable[[], object], Callable[[], object]]]
    needs: tuple[str, ...] = ()
    rounds: int = timing.MIN_ROUNDS
    is_reference: bool = False


def _alone(fmt: str, rounding: str = "nearest") -> Cost:
    def build(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
        x = torch.randn(_ELEMENTS, device=device)
        ours = torch.compile(lambda x: fake_quantize(x, fmt, rounding=rounding))
        copied = torch.compile(lambda x: x * 2)
        return lambda: ours(x), lambda: copied(x)

    return Cost(f"numbers/fake_quantize/{fmt}/{rounding}", "x * 2", build)


def _against_pychop() -> Cost:
    def build(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
        from pychop import Chop

        x = torch.randn(_ELEMENTS, device=device)
        ours = torch.compile(lambda x: fake_quantize(x, "fp8_e5m2"))
        theirs = Chop(exp_bits=5, sig_bits=2, rmode=1)
        return lambda: ours(x), lambda: theirs(x)

    return Cost("numbers/fake_quantize/fp8_e5m2/pychop", "pychop", build, needs=("pychop",))


def _training(fmt: str) -> Cost:
    """A training step of four BERT layers with weights and activations in a format, against the same in float32."""

    def build(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
        quantized, plain = (_training_step(FuseBackend(quantize=spec), device) for spec in (fmt, None))
        return quantized, plain

    return Cost(f"numbers/training/bert/{fmt}", "float32", build, is_reference=True)


def _training_step(backend: FuseBackend, device: str) -> Step:
    built = bert()
    example = Example(built.model.to(device), placed(built.args, device))
    row = Row("bert", bert, train=True)
    return Step(torch.compile(own_function(example.model), backend=backend), example, row)


def _packed_from_converted(rows: int) -> Cost:
    """int8 with static scales: what was calibrated, packed, against its simulation, both compiled."""

    def build(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
        model, x = mlp(768, 3072).to(device).eval(), torch.randn(rows, 768, device=device)
        per_row = Site(as_format("int8"), granularity=Granularity("channel", axis=0))
        simulated = convert(model, QuantSpec(input=Site(as_format("int8"), scale="static"), weight=per_row))
        calibrate(simulated, [x], progress=False)
        ours, theirs = (
            torch.compile(own_function(module), backend=FuseBackend()) for module in (pack(simulated), simulated)
        )
        return _without_grad(ours, x), _without_grad(theirs, x)

    return Cost(f"numbers/packed/int8_static/{rows}", "its simulation", build)


def _without_grad(call: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call(x)

    return run


COSTS = (
    _alone("fp8_e4m3"),
    _alone("fp8_e5m2"),
    _alone("fp8_e4m3", "stoc_prop"),
    _alone("bf16"),
    _alone("int8"),
    _alone("mxfp4"),
    _against_pychop(),
    _training("fp8_e4m3"),
    *(_packed_from_converted(rows) for rows in (1, 16, 512)),
)
