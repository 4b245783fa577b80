"""Timed questions about the libraries of this machine: which of two multiplies one kind of matrices faster.

Measured on one AMD Zen 5 core (torch 2.13): float32 `addmm` (MKL) runs at 88-98 GF/s, oneDNN's linear on plain weights
at 180-217 GF/s in all three products of a Linear (forward, input gradient, weight gradient). On other machines the two
may be level, so it is measured and not assumed. Measured too is the size from which the longer call pays (14 us against
1.5 us there, so from about 3 MFLOP).

With an activation in the same call the two differ even where they multiply equally fast: in bfloat16 (256 x 768 x 1536)
oneDNN's GELU adds 9 % to the product, the kernel that Inductor makes for a GELU of its own 26 %.

A weight that was packed once has two questions of its own. With few rows packing a plain weight takes oneDNN longer
than the product; with many it is the arithmetic that counts (AMD Zen 3, AVX2, 768 x 3072: 1.2-2.2 times MKL's speed
with 4 to 32 rows, 0.9 with 512).

A machine that is busy answers wrongly. So every question is asked several times, the contenders taking turns, by the
CPU time of the thread where there is one; there is an answer only if all times agree.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fuse_pass.gemm import onednn
from fuse_pass.inductor import compat

# A product has at least as many operations where another library is chosen, however small the measured break-even is.
MIN_FLOP = 1_000_000
# oneDNN must be this much faster to be chosen; a tie goes to aten, which Inductor knows how to fuse and tune.
MIN_GAIN = 1.1
# With an activation in the same call a pass over memory is saved too, so that a smaller gain is one.
MIN_GAIN_WITH_ACTIVATION = 1.02
# Chosen from this many times the break-even on: at it nothing is gained, and our op adds a third to the call.
_MARGIN = 4
_SMALL = (1, 16, 16)
_ROUNDS, _REPEATS = 3, 5
# So much faster or slower than it was found to be is no noise of a short look.
CLEAR = 1.25

_Products = Sequence[Callable[[], torch.Tensor]]
_Sizes = tuple[int, int, int]


class Kind(enum.StrEnum):
    """What is asked about oneDNN: its product of plain matrices, with an activation, of a packed weight."""

    PLAIN = ""
    WITH_ACTIVATION = "+activation"
    PACKED_FEW_ROWS = "+packed, few rows"
    PACKED_MANY_ROWS = "+packed, many rows"


@dataclass(frozen=True)
class Question:
    """Whether oneDNN is faster than PyTorch's own product, and from how many operations on.

    Attributes:
        dtype: of the operands.
        kind: of the product.
    """

    dtype: torch.dtype
    kind: Kind

    @property
    def name(self) -> str:
        """In the table."""
        return f"{str(self.dtype).removeprefix('torch.')}{self.kind}"

    @property
    def sizes(self) -> _Sizes:
        """Rows, columns and summed columns of the product that is timed."""
        return {
            Kind.PLAIN: (256, 768, 768),
            # Fewer summed columns, so that the activation is more of the whole than noise.
            Kind.WITH_ACTIVATION: (256, 768, 384),
            Kind.PACKED_FEW_ROWS: (16, 768, 1536),
            Kind.PACKED_MANY_ROWS: (256, 768, 768),
        }[self.kind]

    @property
    def min_gain(self) -> float:
        """How many times faster oneDNN must be."""
        return MIN_GAIN_WITH_ACTIVATION if self.kind is Kind.WITH_ACTIVATION else MIN_GAIN


QUESTIONS = tuple(Question(dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in Kind)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What is measured in the middle of a trace: no fake tensors, no proxies, no autocast, no autograd."""
    with compat.disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


@dataclass(frozen=True)
class Round:
    """One answer to a question.

    Attributes:
        gain: how many times faster oneDNN was.
        break_even: from how many operations on it pays; None where it never does.
    """

    gain: float
    break_even: int | None


def ask(question: Question) -> list[Round]:
    """The answers of all rounds.

    Raises:
        onednn.NoPrimitiveError: it has no product in this dtype.
    """
    with quiet(), onednn.asked_for(question.dtype):
        large, small = _contenders(question), _small_contenders(question.dtype)
        return [_round(question, large, small) for _ in range(_ROUNDS)]


def _round(question: Question, large: tuple[_Products, _Products], small: tuple[_Products, _Products]) -> Round:
    seconds = _seconds_per_product(*large)
    break_even = _break_even(seconds, _seconds_per_product(*small), question.sizes, question.min_gain)
    return Round(seconds[0] / seconds[1], break_even)


def is_tie(question: Question, rounds: Sequence[Round]) -> bool:
    """Whether rounds that disagree all lie about the least gain: then it does not matter who computes."""
    least, most = question.min_gain / CLEAR, question.min_gain * CLEAR
    return all(least <= one.gain <= most for one in rounds)


def contradicts(question: Question, break_even: int | None) -> bool:
    """Whether a look at the forward product (about 10 ms) shows clearly that an answer of before is wrong now.

    A first impression is looked at again, as often as a question is asked: each must be as clear.

    Raises:
        onednn.NoPrimitiveError: it has no product in this dtype.
    """
    with quiet(), onednn.asked_for(question.dtype):
        aten, onednn_s = (products[:1] for products in _contenders(question))
        return all(_is_clearly_wrong(question, break_even, _gain(aten, onednn_s)) for _ in range(_ROUNDS))


def _is_clearly_wrong(question: Question, break_even: int | None, gain: float) -> bool:
    if break_even is None:
        return gain > question.min_gain * CLEAR
    return gain < question.min_gain / CLEAR


def is_faster(one: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor]) -> bool:
    """Whether the first of two ways to compute the same is the faster one here and now."""
    with quiet():
        seconds, seconds_of_other = _seconds_per_product([one], [other])
    return seconds < seconds_of_other


def _gain(aten: _Products, onednn_s: _Products) -> float:
    by_aten, by_onednn = _seconds_per_product(aten, onednn_s, repeats=2)
    return by_aten / by_onednn


def _break_even(large: tuple[float, float], small: tuple[float, float], sizes: _Sizes, min_gain: float) -> int | None:
    """Operations from which oneDNN's faster arithmetic outweighs its longer call; None where it is not faster.

    Args:
        large: seconds of a product of those sizes by aten and by oneDNN.
        small: the same where only the call counts, without activation: Inductor's kernel is called in no time.
        sizes: m, n and k of the large one.
        min_gain: how many times faster oneDNN must be in it.
    """
    aten, onednn = large
    if aten <= min_gain * onednn:
        return None
    saved_per_flop = (aten - onednn) / (2 * math.prod(sizes))
    longer_call = max(0.0, small[1] - small[0])
    # A power of two, so that another probe of the same machine gives the same number and finds the same kernels cached.
    return 1 << max(MIN_FLOP, math.ceil(_MARGIN * longer_call / saved_per_flop)).bit_length()


def _contenders(question: Question) -> tuple[_Products, _Products]:
    """By aten and by oneDNN: the three products of one Linear's training step, or its forward alone."""
    dtype = question.dtype
    x, weight, grad = _operands(question.sizes, dtype)
    linear = compat.onednn_linear()
    assert linear is not None
    if question.kind is Kind.WITH_ACTIVATION:
        # Inductor's own kernel computes half types in float32. Eager's GELU in bfloat16 takes half as long as either.
        return (
            [lambda: torch.nn.functional.gelu(torch.mm(x, weight.t()).float()).to(dtype)],
            [lambda: linear(x, weight, None, "gelu", [], "none")],
        )
    if question.kind is Kind.PLAIN:
        return _by_both((x, weight), (grad, weight.t()), (grad.t(), x.t()))
    packed = onednn.pack(weight, question.sizes[0])
    return [lambda: torch.mm(x, weight.t())], [lambda: linear(x, packed, None, "none", [], "")]


def _small_contenders(dtype: torch.dtype) -> tuple[_Products, _Products]:
    x, weight, _ = _operands(_SMALL, dtype)
    return _by_both((x, weight))


def _operands(sizes: _Sizes, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, out_features, in_features = sizes
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, in_features), (out_features, in_features), (rows, out_features))
    )
    return x, weight, grad


def _by_both(*operands: tuple[torch.Tensor, torch.Tensor]) -> tuple[_Products, _Products]:
    linear = compat.onednn_linear()
    assert linear is not None
    return (
        [functools.partial(torch.mm, a, b.t()) for a, b in operands],
        [functools.partial(linear, a, b, None, "none", [], "") for a, b in operands],
    )


def _seconds_per_product(aten: _Products, onednn: _Products, *, repeats: int = _REPEATS) -> tuple[float, float]:
    """On average over the products, of each the least time: the one that other processes have not disturbed."""
    runs = (*aten, *onednn)
    for run in runs:
        run()  # warm-up
    clock = _clock()
    least = [math.inf] * len(runs)
    # All take turns, so that a change of the machine's speed hits all.
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = clock()
            run()
            least[i] = min(least[i], clock() - start)
    return sum(least[: len(aten)]) / len(aten), sum(least[len(aten) :]) / len(onednn)


def _clock() -> Callable[[], float]:
    """CPU time counts what this thread does, whoever has the processor meanwhile; it leaves out all other threads."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
