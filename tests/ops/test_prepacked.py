"""Products with packed weights: never a result of what a weight was before, whoever wrote into it, and no leak."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.gemm import measured, onednn, packed_weights, probe
from fuse_pass.gemm.probe import Kind
from fuse_pass.gemm.problem import GemmProblem
from fuse_pass.gemm.providers import Packed, best
from fuse_pass.inductor import compat
from fuse_pass.numerics.activations import ACTIVATIONS
from tests.precision import assert_as_exact_as_eager

pytestmark = [
    pytest.mark.processor,
    pytest.mark.skipif(compat.onednn_linear() is None, reason="this build of PyTorch lacks oneDNN"),
]
DTYPES = (torch.float32, torch.bfloat16)
ROWS, D_OUT, D_IN = 5, 48, 32


@pytest.fixture(autouse=True)
def nothing_packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(packed_weights, "PACKED", packed_weights.PackedWeights())
    with torch.no_grad():
        yield


def weight_of(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(D_OUT, D_IN).to(dtype))


def packs() -> int:
    gc.collect()
    return len(packed_weights.PACKED)


def check(weight: Tensor, rows: int = ROWS, post_op: tuple[str, str] = ("none", ""), name: str = "") -> None:
    """One product, against what the weight is now."""
    x, bias = (torch.randn(*shape, dtype=torch.float64).to(weight.dtype) for shape in ((rows, D_IN), (D_OUT,)))
    attribute, algorithm = post_op
    y = torch.ops.fuse_pass.gemm_prepacked(x, weight, bias, attribute, [], algorithm)
    act = ACTIVATIONS[name].forward if name else lambda h, *_: h
    eager = act(F.linear(x, weight, bias), (), None)
    exact = act(F.linear(x.double(), weight.detach().double(), bias.double()), (), None)
    assert_as_exact_as_eager(y, eager, exact)


def packed_weight(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    weight = weight_of(dtype)
    check(weight)
    assert packs() == 0, "not before it was seen unchanged"
    check(weight)
    assert packs() == onednn.multiplies(dtype), "where oneDNN cannot read it, it is left as it is"
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 3, 64, 700])
def test_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    weight = packed_weight(dtype)
    check(weight, rows)
    assert packs() == onednn.multiplies(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, row in ACTIVATIONS.items() if row.post_op and name != "leaky_relu"])
def test_activations_in_the_same_call(name: str, dtype: torch.dtype) -> None:
    check(packed_weight(dtype), ROWS, ACTIVATIONS[name].post_op, name)


def _step(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()


def _compiled_step(weight: nn.Parameter) -> None:
    torch.compile(lambda w: w.mul_(-1.5), backend="aot_eager")(weight)


def _load(weight: nn.Parameter) -> None:
    layer = nn.Linear(D_IN, D_OUT, bias=False)
    layer.weight = weight
    layer.load_state_dict({"weight": torch.randn(D_OUT, D_IN)})


def _swap(weight: nn.Parameter) -> None:
    torch.utils.swap_tensors(weight, weight_of())


def _replace_data(weight: nn.Parameter) -> None:
    weight.data = torch.randn(D_OUT, D_IN)


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda weight: weight.mul_(2),
    "one element": lambda weight: weight[3].__setitem__(4, 100.0),
    "through a view": lambda weight: weight.view(-1)[7:9].fill_(50.0),
    "through detach()": lambda weight: weight.detach().zero_(),
    "by an optimizer": _step,
    "by a compiled function": _compiled_step,
    "by load_state_dict": _load,
    "by .data = other": _replace_data,
    "by swap_tensors": _swap,
    "through .data": lambda weight: weight.data.mul_(2),
    "through NumPy": lambda weight: weight.detach().numpy().__imul__(2),
    "through its memory": lambda weight: weight.untyped_storage().copy_(torch.randn(D_OUT, D_IN).untyped_storage()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_packed_again(change: str) -> None:
    weight = packed_weight()
    for _ in range(2):
        CHANGES[change](weight)
        for _ in range(3):
            check(weight)
        assert packs() == 1


def test_a_weight_that_changes_in_every_call_is_never_packed() -> None:
    weight = packed_weight()
    for _ in range(3):
        weight.add_(1)
        check(weight)
        assert packs() == 0


def test_the_copy_goes_with_the_weight() -> None:
    weights = [weight_of() for _ in range(3)]
    for weight in weights * 2:
        check(weight)
    assert packs() == 3
    del weight, weights[1]
    assert packs() == 2
    weights[0].data = torch.ones(1, 1)
    assert packs() == 1
    weights.clear()
    assert packs() == 0


def test_another_weight_at_the_same_address() -> None:
    """Memory that is given back is given out again; a new tensor there has the version of the old one."""
    addresses = set()
    for _ in range(20):
        weight = weight_of()
        addresses.add(weight.data_ptr())
        check(weight)
        check(weight)
        del weight
    assert len(addresses) < 20, "no address came twice, so that nothing was tested"
    assert packs() == 0


def test_other_memory_under_the_same_tensor() -> None:
    weight = packed_weight()
    old = weight.data
    for value in (torch.randn(D_OUT, D_IN), old, torch.randn(D_OUT, D_IN)):
        weight.data = value
        check(weight)
        check(weight)


def test_a_deep_copy_has_its_own() -> None:
    weight = packed_weight()
    twin = copy.deepcopy(weight)
    twin.mul_(3)
    for tensor in (weight, twin) * 3:
        check(tensor)
    assert packs() == 2


def test_tied_weights_share_one() -> None:
    weight = packed_weight()
    first, second = nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, D_OUT)
    first.weight = second.weight = weight
    for layer in (first, second):
        check(layer.weight)
    assert packs() == 1
    first.weight.mul_(2)
    for layer in (first, second, first):
        check(layer.weight)
    assert packs() == 1


def test_copies_never_take_more_than_the_memory_they_are_of() -> None:
    """Parts of one merged weight have one each; overlapping ones do not."""
    merged = torch.randn(3 * D_OUT, D_IN)
    for _ in range(3):
        for part in merged.split(D_OUT):
            check(part)
    assert packs() == 3
    for start in range(0, 2 * D_OUT):
        for _ in range(2):
            check(merged[start : start + D_OUT])
    assert packs() <= 3


@pytest.mark.parametrize("kind", ["inference", "transposed", "float64"])
def test_what_cannot_be_watched_is_not_packed(kind: str) -> None:
    with torch.inference_mode(kind == "inference"):
        weight = torch.randn(D_OUT, D_IN)
    weight = {"transposed": torch.randn(D_IN, D_OUT).t(), "float64": weight.double()}.get(kind, weight)
    for _ in range(3):
        assert packed_weights.PACKED.of(weight) is None
    assert packs() == 0
    if kind != "float64":  # which oneDNN does not multiply
        check(weight)


def test_a_weight_with_nan_is_right_too() -> None:
    weight = weight_of()
    weight.fill_(torch.nan)
    for _ in range(3):
        y = torch.ops.fuse_pass.gemm_prepacked(torch.ones(2, D_IN), weight, None, "none", [], "")
        assert y.isnan().all()


def test_threads_share_the_copies() -> None:
    weights = [weight_of() for _ in range(4)]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                for weight in weights * 25:
                    check(weight)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert packs() == 4


def test_passes_opcheck() -> None:
    x, weight, bias = torch.randn(ROWS, D_IN), torch.randn(D_OUT, D_IN), torch.randn(D_OUT)
    torch.library.opcheck(torch.ops.fuse_pass.gemm_prepacked.default, (x, weight, bias, "gelu", [], "tanh"))
    torch.library.opcheck(torch.ops.fuse_pass.dense_prepacked.default, (x, weight, bias, "", []))


@pytest.mark.parametrize("when", ["packing", "multiplying"])
def test_where_a_packed_product_fails_the_plain_weight_is_multiplied(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that oneDNN has packed is of no use to aten."""
    weight = packed_weight()

    def fail(*arguments: object) -> Tensor:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(onednn, "_failed", set())
    if when == "packing":
        monkeypatch.setattr(packed_weights, "PACKED", packed_weights.PackedWeights())
        monkeypatch.setattr(compat, "pack_onednn_weight", fail)
    else:
        monkeypatch.setattr(compat, "onednn_linear", lambda: fail)
    for _ in range(3):
        check(weight, post_op=("gelu", "none"), name="gelu")
    assert not onednn.multiplies(torch.float32)


def test_only_large_weights_of_the_right_dtypes_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    def pays(
        dtype: torch.dtype, sizes: tuple[int | None, int] = (1024, 1024), device: str = "cpu", rows: int | None = 16
    ) -> bool:
        problem = GemmProblem(torch.device(device), dtype, (rows, *sizes), is_constant=True, in_graph=False)
        return isinstance(best(problem), Packed)

    few, many = Kind.PACKED_FEW_ROWS, Kind.PACKED_MANY_ROWS
    table = {
        measured.name(dtype, kind): probe.MIN_FLOP for dtype in (torch.float32, torch.bfloat16) for kind in (few, many)
    }
    monkeypatch.setattr(measured, "table", lambda: table)
    assert pays(torch.float32)
    for sizes in ((64, 64), (None, 1024), (2, 1 << 20)):
        assert not pays(torch.float32, sizes)
    assert not pays(torch.float32, device="cuda")
    assert not pays(torch.float64)
    assert not pays(torch.float16)
    monkeypatch.setattr(onednn, "_failed", {torch.float32})
    assert not pays(torch.float32), "where oneDNN has failed"
    monkeypatch.setattr(onednn, "_failed", set())
    for kind, rows in ((few, {2: True, 64: True, 65: False, None: False}), (many, {2: False, 65: True, None: True})):
        monkeypatch.setattr(measured, "table", lambda kind=kind: {measured.name(torch.float32, kind): probe.MIN_FLOP})
        assert {count: pays(torch.float32, rows=count) for count in rows} == rows, "where MKL is as fast"
    monkeypatch.setattr(measured, "table", lambda: table)
    for fast in (False, True):
        monkeypatch.setattr(compat, "has_fast_cpu_dtype", lambda dtype, fast=fast: fast)
        assert pays(torch.bfloat16) == fast
