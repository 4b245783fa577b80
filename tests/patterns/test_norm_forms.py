"""LayerNorm and RMSNorm written out: every algebraically equal way is found, and nothing that is almost one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_pass.patterns import spellings
from fuse_pass.patterns.spellings.written_out_norms import deberta, gemma, llama
from fuse_pass.report import Reason
from tests.capture import capture
from tests.patterns.truth import assert_declines, assert_fused_like_eager, eager, fused, leaves

example_inputs = spellings.dropout_norm.CORPUS.example_inputs

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
EPS = 1e-3  # large enough that a forgotten or doubled one is seen


def mean(z: Tensor, **options: Any) -> Tensor:
    return z.mean(-1, keepdim=True, **options)


def square_mean(z: Tensor) -> Tensor:
    return z.pow(2).mean(-1, keepdim=True)


def squares_minus_square(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (z - mean(z)) * torch.rsqrt((z * z).mean(-1, keepdim=True) - mean(z) ** 2 + EPS) * w + b


def as_batch_norm_is(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    scale = w * torch.rsqrt(z.var(-1, correction=0, keepdim=True) + EPS)
    return z * scale + (b - mean(z) * scale)


def in_place(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = z * torch.rsqrt(square_mean(z) + EPS)
    y *= w
    return y


def over_two(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance = z.var((-1, -2), unbiased=False, keepdim=True)
    return (z - z.mean((1, 2), keepdim=True)) / (variance + EPS).sqrt()


FORMS: dict[str, Form] = {
    "pow, mean, rsqrt": lambda z, w, b: w * (z * torch.rsqrt(square_mean(z) + EPS)),
    "eps first": lambda z, w, b: z * torch.rsqrt(EPS + square_mean(z)) * w,
    "weight into the factor": lambda z, w, b: z * (w * torch.rsqrt(square_mean(z) + EPS)),
    "x * x": lambda z, w, b: z * (z * z).mean(-1, keepdim=True).add(EPS).rsqrt() * w,
    "square": lambda z, w, b: z * torch.rsqrt(torch.mean(torch.square(z), dim=-1, keepdim=True) + EPS),
    "norm, axis": lambda z, w, b: z * torch.rsqrt(torch.mean(z**2, axis=-1, keepdim=True) + EPS) * w,
    "divided by sqrt": lambda z, w, b: z / torch.sqrt(square_mean(z) + EPS) * w,
    "1 / sqrt": lambda z, w, b: z * (1 / (square_mean(z) + EPS).sqrt()) * w,
    "reciprocal of sqrt": lambda z, w, b: z * (square_mean(z) + EPS).sqrt().reciprocal() * w,
    "divided by the reciprocal": lambda z, w, b: z / torch.rsqrt(square_mean(z) + EPS).reciprocal() * w,
    "pow -0.5": lambda z, w, b: z * torch.pow(square_mean(z) + EPS, -0.5) * w,
    "** 0.5": lambda z, w, b: z / (square_mean(z) + EPS) ** 0.5 * w,
    "sum over the width": lambda z, w, b: z / ((z * z).sum(-1, keepdim=True) / z.shape[-1] + EPS).sqrt() * w,
    "unsqueezed": lambda z, w, b: z * torch.rsqrt(z.square().mean(-1) + EPS).unsqueeze(-1) * w,
    "no weight, a bias": lambda z, w, b: z * torch.rsqrt(square_mean(z) + EPS) + b,
    "1 + weight": lambda z, w, b: z * torch.rsqrt(square_mean(z) + EPS) * (1.0 + w),
    "weight with leading ones": lambda z, w, b: z * torch.rsqrt(square_mean(z) + EPS) * w[None, None],
    "layer norm, sqrt of var": lambda z, w, b: (
        (z - mean(z)) / torch.sqrt(z.var(-1, keepdim=True, unbiased=False) + EPS) * w + b
    ),
    "layer norm, var of the centred": lambda z, w, b: (
        w * (z - mean(z)) * torch.rsqrt(square_mean(z - mean(z)) + EPS) + b
    ),
    "layer norm, squares minus square": squares_minus_square,
    "layer norm as a batch norm": as_batch_norm_is,
    "layer norm, bias first": lambda z, w, b: b + w * (z - mean(z)) * torch.rsqrt(torch.var(z, -1, False, True) + EPS),
    "layer norm over two dimensions": over_two,
    "in place": in_place,
}


def after_sum(form: Form) -> Callable[..., Tensor]:
    return lambda x, r, w, b: form(F.dropout(x, 0.25) + r, w, b)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_found_once(form: str) -> None:
    found = assert_fused_like_eager(after_sum(FORMS[form]), example_inputs(), counts={"dropout_norm": 1})
    assert found.report.declines == []
    assert "written out" in found.report.matches[0].variant
    (call,) = found.calls("dropout_norm")
    assert call.args[6] == pytest.approx(EPS)
    assert call.args[8] == ("layer_norm" if form.startswith("layer norm") else "rms_norm")


@pytest.mark.parametrize("form", FORMS)
def test_in_float64_and_with_dynamic_shapes(form: str) -> None:
    inputs = example_inputs(torch.float64)
    assert_fused_like_eager(after_sum(FORMS[form]), inputs, counts={"dropout_norm": 1})
    assert_fused_like_eager(after_sum(FORMS[form]), inputs, dynamic=form != "sum over the width" or None)


NOT_QUITE: dict[str, tuple[Form, Reason | None]] = {
    "unbiased variance": (
        lambda z, w, b: (z - mean(z)) / torch.sqrt(z.var(-1, keepdim=True) + EPS) * w + b, Reason.CONSTANTS,
    ),
    "deviation plus eps": (
        lambda z, w, b: w * (z - mean(z)) / (z.std(-1, keepdim=True) + EPS) + b, Reason.CONSTANTS,
    ),
    "biased deviation plus eps": (
        lambda z, w, b: (z - mean(z)) / (z.std(-1, keepdim=True, unbiased=False) + EPS), Reason.CONSTANTS,
    ),
    "half the mean": (lambda z, w, b: z * torch.rsqrt(0.5 * square_mean(z) + EPS) * w, Reason.CONSTANTS),
    "no eps": (lambda z, w, b: z * torch.rsqrt(square_mean(z)) * w, Reason.CONSTANTS),
    "eps is a tensor": (lambda z, w, b: z * torch.rsqrt(square_mean(z) + w[0].abs()) * w, Reason.CONSTANTS),
    "other dimension": (
        lambda z, w, b: z * torch.rsqrt(z.pow(2).mean(1, keepdim=True) + EPS) * w, Reason.LAYOUT,
    ),
    "channels first": (
        lambda z, w, b: z * torch.rsqrt(z.pow(2).mean(1, keepdim=True) + EPS) * w[:5, None], Reason.COST,
    ),
    "two dimensions do not agree": (
        lambda z, w, b: (z - z.mean(1, keepdim=True)) * torch.rsqrt(square_mean(z) + EPS) * w, None,
    ),
    "not centred": (lambda z, w, b: z * torch.rsqrt(z.var(-1, keepdim=True, unbiased=False) + EPS) * w, None),
    "centred by half": (lambda z, w, b: (z - mean(z) / 2) * torch.rsqrt(square_mean(z) + EPS), None),
    "not squared": (lambda z, w, b: z * torch.rsqrt(mean(z.abs()) + EPS) * w, None),
    "cubed": (lambda z, w, b: z * torch.rsqrt(mean(z.pow(4)) + EPS) * w, None),
    "multiplied by the deviation": (lambda z, w, b: z * torch.sqrt(square_mean(z) + EPS) * w, None),
    "the square of the norm": (lambda z, w, b: z * z * torch.rsqrt(square_mean(z) + EPS), None),
    "clamped": (lambda z, w, b: z * torch.rsqrt(square_mean(z).clamp(min=0.5) + EPS) * w, None),
    "rounded quotient": (
        lambda z, w, b: torch.div(z, torch.sqrt(square_mean(z) + EPS), rounding_mode="floor"), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", NOT_QUITE)
def test_near_misses_stay_as_they_are(form: str) -> None:
    function, reason = NOT_QUITE[form]
    found = assert_fused_like_eager(lambda x, r, w, b: function(x + r, w, b), example_inputs(), counts={})
    assert [decline.reason for decline in found.report.declines] == ([] if reason is None else [reason])
    assert found.rewritten[0] is found.originals[0]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dims", [(0, 1), (1, 2)])
def test_the_strides_of_a_transposed_sum_are_kept(dims: tuple[int, int], dynamic: bool) -> None:
    """Elementwise arithmetic keeps them; the norms that have a name do not, and neither does the op."""

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        z = x.transpose(*dims) + r.transpose(*dims)
        return FORMS["pow, mean, rsqrt"](z, w[: z.shape[-1]], b), z

    found = assert_fused_like_eager(function, example_inputs(), counts={"dropout_norm": 1}, dynamic=dynamic)
    expected = function(*example_inputs().values())
    assert [value.stride() for value in found.output] == [value.stride() for value in expected]


def test_a_stream_that_begins_as_a_transposed_image() -> None:
    """`conv(x).flatten(2).transpose(1, 2)`: every sum of the stream has the strides of its first operand."""
    patch, layers = nn.Conv2d(3, 8, 2, 2), nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def function(image: Tensor, w: Tensor) -> Tensor:
        h = patch(image).flatten(2).transpose(1, 2)
        for layer in layers:
            h = h + layer(FORMS["pow, mean, rsqrt"](h, w, w))
        return FORMS["pow, mean, rsqrt"](h, w, w)

    inputs = {"image": torch.randn(2, 3, 6, 4), "w": torch.randn(8).requires_grad_()}
    found = capture(function, *inputs.values())
    assert found.report.counts() == {"dropout_norm": 3}, str(found.report)
    torch.testing.assert_close(found.output, function(*inputs.values()))
    assert found.output.stride() == function(*inputs.values()).stride()


@pytest.mark.parametrize("after", [
    lambda y, z: y * z[:, :1], lambda y, z: y * 2.0, lambda y, z: y * y, lambda y, z: y + z, lambda y, z: y - mean(y),
])  # fmt: skip
def test_what_follows_the_norm_stays_outside(after: Any) -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = x + r
        return after(FORMS["pow, mean, rsqrt"](z, w, b), z)  # type: ignore[no-any-return]

    found = assert_fused_like_eager(function, example_inputs(), counts={"dropout_norm": 1})
    assert found.calls("dropout_norm")[0].args[2] is not None


@pytest.mark.parametrize("form", [
    lambda z: (z - z.mean(-1)) * torch.rsqrt(z.var(-1, unbiased=False, keepdim=True) + EPS),
    lambda z: z * torch.rsqrt(z.square().mean(-1) + EPS),
    lambda z: z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS + z.square().mean(-1) - z.square().mean(-1)),
    lambda z: z * torch.rsqrt(z.square().mean(-1) * torch.ones(24) + EPS).unsqueeze(-1),
])  # fmt: skip
def test_square_sizes_do_not_hide_a_lost_dimension(form: Any) -> None:
    """A mean without keepdim meets the columns, not the rows; only sizes that are equal let it."""
    inputs = {"x": torch.randn(24, 24, requires_grad=True), "r": torch.randn(24, 24)}
    assert_fused_like_eager(lambda x, r: form(x + r), inputs, counts={})


def test_statistics_that_are_read_elsewhere_decline() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        z = x + r
        factor = torch.rsqrt(square_mean(z) + EPS)
        return z * factor * w, factor

    assert_declines(function, example_inputs(), Reason.SECOND_READER, "factor")


def test_a_cast_sum_that_is_read_again_stays() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        wide = (x + r).float()
        return (wide * torch.rsqrt(square_mean(wide) + EPS)).to(x.dtype) * w, wide

    inputs = example_inputs(torch.bfloat16)
    found = assert_fused_like_eager(function, inputs, counts={"dropout_norm": 1})
    assert "sum read again" in found.report.matches[0].variant


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_in_half_precision_are_not_ours(form: str, dtype: torch.dtype) -> None:
    """Each step of the original rounds, and float16 overflows where the fused op would not."""
    found, _ = fused(lambda x, r, w, b: FORMS[form](x + r, w, b), leaves(example_inputs(dtype)))
    assert [decline.reason for decline in found.report.declines] == [Reason.DTYPES]
    assert found.report.matches == []


@pytest.mark.parametrize("form", [llama, gemma, deberta])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_where_the_original_rounds(form: Form, dtype: torch.dtype) -> None:
    """Bit for bit, up to ties that the last bit of float32 breaks; rounding elsewhere would move every fifth value."""
    x, r, w, b = (torch.randn(s).to(dtype) for s in ((200, 96), (200, 96), (96,), (96,)))
    found, ours = fused(lambda x, r, w, b: form(x + r, w, b), [x, r, w, b])
    assert found.report.counts() == {"dropout_norm": 1}
    assert (ours.values[0] != form(x + r, w, b)).float().mean() < 1e-3


@pytest.mark.parametrize("form", [llama, deberta])
def test_mixed_precision_declines(form: Form) -> None:
    """A half value that a float32 weight multiplies has been rounded on the way."""
    x, r = torch.randn(3, 24).bfloat16(), torch.randn(3, 24).bfloat16()
    found, ours = fused(lambda x, r, w, b: form(x + r, w, b), [x, r, torch.randn(24), torch.randn(24)])
    assert [decline.reason for decline in found.report.declines] == [Reason.DTYPES]
    assert ours.values[0].dtype is torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
def test_eps_as_an_argument(dynamic: bool) -> None:
    def function(eps: float, x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = x + r
        return z * torch.rsqrt(square_mean(z) + eps) * w

    inputs = {"eps": 0.03, **example_inputs()}
    assert_fused_like_eager(function, inputs, dynamic=dynamic, counts={"dropout_norm": 1})


def test_a_lone_norm_is_left_to_inductor() -> None:
    inputs = example_inputs()
    found = capture(lambda x, w, b: FORMS["pow, mean, rsqrt"](torch.sin(x), w, b), inputs["x"], inputs["weight"], None)
    assert found.report.matches == []
    assert found.report.declines == []


@pytest.mark.parametrize("form", ["pow, mean, rsqrt", "layer norm, sqrt of var"])
def test_compiled_by_inductor(form: str) -> None:
    inputs = example_inputs()

    def function(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return FORMS[form](x + r, w, b)

    compiled = torch.compile(function, backend="fuse_pass_backend")
    ours, exact = eager(compiled, leaves(inputs)), eager(function, leaves(inputs, torch.float64))
    torch.testing.assert_close(ours.values[0].double(), exact.values[0], rtol=1e-5, atol=1e-5)
    for grad, expected in zip(ours.grads, exact.grads, strict=True):
        assert (grad is None) == (expected is None)
        if grad is not None and expected is not None:
            torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)
