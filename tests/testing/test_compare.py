"""The judge: what counts as wrong when numbers, and other things, differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fuse_pass.testing import levels
from fuse_pass.testing.compare import Status, _one_line, judge
from fuse_pass.testing.differences import Runs
from fuse_pass.testing.observe import Round

USUAL, LARGEST = 1e-6, 1e-4


def called(output: float, *, gradient: bool = False) -> Runs:
    """One call that returned a number, and left a gradient for its input or did not."""
    grads: dict[str, Tensor | None] = {"input 0": torch.zeros(1) if gradient else None}
    outputs = (torch.tensor([output], dtype=torch.float64).float(),)
    return [Round(outputs, grads, (), (True,), {}, frozenset(), draws=False, moves_generator=False)]


def ours(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    raise NotImplementedError("only its name is asked")


def stock(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    raise NotImplementedError("only its name is asked")


def stock_at_least_budget(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    raise NotImplementedError("only its name is asked")


NAMES: dict[levels.Backend, str] = {ours: "ours", stock: "stock", stock_at_least_budget: "stock at the least budget"}


@pytest.fixture(autouse=True)
def named_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "fused", lambda level: ours)
    monkeypatch.setattr(
        levels, "stock", lambda level, *, least_budget=False: stock_at_least_budget if least_budget else stock
    )


@dataclass
class Numbers:
    """Contenders of which each has an error; eager's is larger for some data.

    Attributes:
        ours: the error of what fuse_pass compiles.
        stock: of what torch.compile compiles.
        gradients: which of them leave a gradient that eager does not.
        stock_at_first: whether stock has its error for the first set of data too.
        onednn: of eager's other library.
        reference: by how much float64 is off for inputs that are hardly others.
    """

    ours: float
    stock: float = 0.0
    gradients: tuple[str, ...] = ()
    stock_at_first: bool = True
    onednn: float = 0.0
    reference: float = 0.0
    level: str = "aot"
    seed: int = 0

    def compiled(self, backend: levels.Backend) -> Callable[[int], Runs]:
        name = NAMES[backend]
        return lambda seed: called(1 + self._error(name.split(" at ")[0], seed), gradient=name in self.gradients)

    def _error(self, name: str, seed: int) -> float:
        error: float = getattr(self, name)
        return 0.0 if name == "stock" and seed == self.seed and not self.stock_at_first else error

    def eager(self, seed: int) -> Runs:
        return called(1 + (LARGEST if seed % 5 == 2 else USUAL))

    def exact(self, seed: int) -> Runs:
        return called(1.0)

    def by_onednn(self, seed: int) -> Runs:
        return called(1.0 + self.onednn)

    def nearby(self, seed: int) -> Runs:
        return called(1.0 + self.reference)

    def in_float32(self, seed: int) -> None:
        return None


@pytest.mark.parametrize(
    ("contenders", "status"),
    [
        pytest.param(Numbers(0.0), Status.RIGHT, id="right"),
        pytest.param(Numbers(USUAL), Status.RIGHT, id="as eager"),
        pytest.param(Numbers(5 * USUAL), Status.RIGHT, id="less than eager for other data"),
        pytest.param(Numbers(5 * LARGEST), Status.WRONG, id="more than eager for any data"),
        pytest.param(Numbers(5 * LARGEST, 5 * LARGEST), Status.AS_STOCK, id="as torch.compile"),
        pytest.param(
            Numbers(5 * LARGEST, 5 * LARGEST, stock_at_first=False),
            Status.AS_STOCK,
            id="as torch.compile for other data",
        ),
        pytest.param(Numbers(5 * LARGEST, reference=3 * LARGEST), Status.RIGHT, id="where the reference is as far off"),
        pytest.param(Numbers(5 * LARGEST, onednn=3 * LARGEST), Status.RIGHT, id="as eager by the other library"),
        pytest.param(Numbers(5 * LARGEST, onednn=LARGEST), Status.WRONG, id="more than eager by either library"),
        pytest.param(Numbers(5 * LARGEST, reference=LARGEST), Status.WRONG, id="more than the reference is off"),
        pytest.param(Numbers(0.0, gradients=("ours",)), Status.WRONG, id="a gradient too many"),
        pytest.param(Numbers(0.0, gradients=("ours", "stock")), Status.AS_STOCK, id="as in torch.compile"),
        pytest.param(
            Numbers(0.0, gradients=("ours", "stock at the least budget")),
            Status.AS_STOCK,
            id="as in torch.compile at the least budget",
        ),
        pytest.param(Numbers(5 * USUAL, gradients=("ours",)), Status.WRONG, id="an error of eager's and a gradient"),
        pytest.param(
            Numbers(5 * USUAL, gradients=("ours", "stock")), Status.RIGHT, id="eager's error beside stock's gradient"
        ),
        pytest.param(
            Numbers(5 * LARGEST, gradients=("ours", "stock")), Status.WRONG, id="too large beside stock's gradient"
        ),
    ],
)
def test_verdict(contenders: Numbers, status: Status) -> None:
    verdict = judge(contenders)
    assert verdict.status is status, str(verdict)
    assert bool(verdict.differences) == (status is not Status.RIGHT or contenders.ours > 2 * USUAL)


def test_what_stock_shows_is_not_listed() -> None:
    verdict = judge(Numbers(5 * LARGEST, gradients=("ours", "stock")))
    assert {difference.aspect for difference in verdict.differences} == {"value"}


def test_what_a_backend_raised_is_named_and_not_only_that_it_did() -> None:
    def failing(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        raise ValueError("the reason\nand more")

    with pytest.raises(Exception, match="the reason") as caught:
        torch.compile(lambda x: x + 1, backend=failing)(torch.ones(1))
    assert _one_line(caught.value) == "BackendCompilerFailed: ValueError: the reason"
    assert _one_line(KeyError()) == "KeyError: "
