"""Kinds of formats: what each answers, and that a new one needs its row and its quantizer only."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fuse_pass import FuseBackend, convert
from fuse_pass.numerics.formats import BlockFormat, FixedFormat, FloatFormat, Format, IntFormat, QParams, formats
from fuse_pass.numerics.spec import QuantSpec, Site
from fuse_pass.quantization.functional import fake_quantize
from fuse_pass.quantization.observers import MinMax
from fuse_pass.quantization.quantizers import QUANTIZERS, Quantizer, quantizer_for


def test_every_kind_has_a_quantizer() -> None:
    assert set(QUANTIZERS) == {type(fmt) for fmt in formats.values()}
    assert {type(quantizer_for(fmt, "nearest")) for fmt in formats.values()} == set(QUANTIZERS.values())


@pytest.mark.parametrize(
    ("fmt", "scales", "default", "zero_point", "has_zero_point"),
    [
        (FloatFormat(4, 3), ("dynamic", "static"), None, False, False),
        (IntFormat(8), ("dynamic", "static", "learned"), "dynamic", True, False),
        (IntFormat(8, symmetric=False), ("dynamic", "static", "learned"), "dynamic", True, True),
        (FixedFormat(3, 4), (), None, False, False),
        (BlockFormat(FloatFormat(2, 1), 32), (), None, False, False),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_where_scales_come_from(
    fmt: Format, scales: tuple[str, ...], default: str | None, zero_point: bool, has_zero_point: bool
) -> None:
    found = (fmt.scales, fmt.default_scale, fmt.takes_zero_point, fmt.has_zero_point)
    assert found == (scales, default, zero_point, has_zero_point)
    low, high = torch.tensor([-3.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 6.0])
    if not scales:
        with pytest.raises(ValueError, match=f"{fmt.name} brings its own scale"):
            fmt.qparams_for(low, high)
        return
    scale, zero = fmt.qparams_for(low, high)
    if not has_zero_point:
        assert zero is None
        assert torch.equal(scale, torch.tensor([3 / fmt.steps, 1.0, 6 / fmt.steps]))
        assert torch.equal(scale, fmt.scale_for(torch.tensor([3.0, 0.0, 6.0])))
        return
    assert fmt.steps == 255
    assert zero is not None
    torch.testing.assert_close(scale, torch.tensor([4 / 255, 1.0, 6 / 255]))
    assert zero.tolist() == [63, -128, -128]


def test_a_format_derived_from_a_known_kind_is_rounded_as_that_kind() -> None:
    class Named(FloatFormat):
        pass

    x = torch.randn(50)
    assert torch.equal(fake_quantize(x, Named(4, 3, encoding="fn")), fake_quantize(x, "fp8_e4m3"))


# --- a kind of its own ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowersOfTwo(Format):
    """±2^e with |e| <= range, and 0."""

    range: int
    name: str = "powers_of_two"


class PowersOfTwoQuantizer(Quantizer[PowersOfTwo]):
    def rounded(self, x: Tensor, qparams: QParams | None, seed: Tensor | None) -> Tensor:
        limit = self.format.range
        y = x.sign() * torch.exp2(torch.log2(x.detach().abs()).round().clamp(-limit, limit))
        return torch.ops.fuse_pass.straight_through(x, y.detach())


EXPECTED = {0.0: 0.0, 1.0: 1.0, 1.3: 1.0, 1.5: 2.0, -3.1: -4.0, 100.0: 4.0, 1e-4: 0.25}


def test_a_kind_without_a_quantizer_is_named() -> None:
    with pytest.raises(TypeError, match="no quantizer for a PowersOfTwo; expected one for it in"):
        fake_quantize(torch.ones(3), PowersOfTwo(2))


def test_a_new_kind_is_a_row_and_a_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZERS, PowersOfTwo, PowersOfTwoQuantizer)
    fmt = PowersOfTwo(2)
    x = torch.tensor(list(EXPECTED), requires_grad=True)
    y = fake_quantize(x, fmt)
    assert y.tolist() == list(EXPECTED.values())
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))
    assert Site(fmt).is_idempotent
    assert not Site(fmt).takes_scale
    seen = MinMax()
    seen.observe(x)
    for refused in (
        lambda: fake_quantize(x, fmt, scale="absmax"),
        lambda: Site(fmt, scale="static"),
        lambda: seen.scale_and_zero_point(fmt),
    ):
        with pytest.raises(ValueError, match="powers_of_two brings its own scale"):
            refused()


def test_layers_and_graphs_take_a_new_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZERS, PowersOfTwo, PowersOfTwoQuantizer)
    fmt = PowersOfTwo(4)
    model, x = nn.Linear(12, 7), torch.randn(5, 12)
    weight, bias = (fake_quantize(p.detach(), fmt) for p in (model.weight, model.bias))
    expected = fake_quantize(nn.functional.linear(fake_quantize(x, fmt), weight, bias), fmt)
    assert torch.equal(convert(model, fmt)(x), expected)
    backend = FuseBackend(quantize=QuantSpec.uniform(fmt), strict=True)
    assert torch.equal(torch.compile(model, backend=backend)(x), expected)
