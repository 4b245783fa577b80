"""Products with weights of few bits: exact against int64 and float64, in every build of the kernels and without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fuse_pass.gemm import integers
from fuse_pass.inductor.cpp_compiler import cpp_compiler
from fuse_pass.kernels import build, few_bits

pytestmark = pytest.mark.processor
BITS = few_bits.WIDTHS
SIZES = [
    (1, 1, 1),
    (1, 5, 7),
    (2, 16, 32),
    (3, 17, 33),
    (5, 64, 64),
    (6, 100, 130),
    (7, 33, 96),
    (13, 130, 257),
    (16, 32, 64),
    (17, 50, 130),
    (70, 97, 200),
    (0, 3, 8),
]
SIGNED = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1])


@pytest.fixture(scope="module", params=["none", "0", "1", "2", "3"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Each build that this processor can run, and plain PyTorch."""
    patch = pytest.MonkeyPatch()
    if request.param == "none":
        patch.setattr(build, "library", lambda: None)
    else:
        if int(request.param) > build.level():
            pytest.skip(f"this processor runs no LEVEL {request.param}")
        if cpp_compiler() is None:
            pytest.skip("there is no C++ compiler")
        patch.setattr(build, "level", lambda: int(request.param))
        loaded = build.load()
        assert loaded is not None
        patch.setattr(build, "library", lambda: loaded)
    yield request.param
    patch.undo()


def codes_of(columns: int, inner: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (columns, inner), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "inner"), SIZES)
def test_integer_products_are_exact(rows: int, columns: int, inner: int, bits: int, kernels: str) -> None:
    codes = codes_of(columns, inner, bits)
    a = torch.randint(-128, 128, (rows, inner), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    y = few_bits.integer_product(a, few_bits.pack(codes, bits), columns, bits)
    assert y.dtype is torch.int32
    assert torch.equal(y.long(), a.long() @ codes.long().t())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("a", [-128, 127])
def test_extremes_do_not_saturate(a: int, bits: int, kernels: str) -> None:
    """Every pair of the largest products, over an inner size that any 16-bit sum would leave."""
    for inner in (64, 1000, 4096, few_bits.MAX_INNER):
        codes = torch.full((17, inner), (1 << bits) - 1, dtype=torch.uint8)
        rows = torch.full((20, inner), a, dtype=torch.int8)
        y = few_bits.integer_product(rows, few_bits.pack(codes, bits), 17, bits)
        assert (y == a * ((1 << bits) - 1) * inner).all()


def test_all_products_of_8_bits(kernels: str) -> None:
    """All 65536 pairs of an int8 and a code."""
    a = torch.arange(-128, 128).to(torch.int8).unsqueeze(1)
    codes = torch.arange(256).to(torch.uint8).unsqueeze(1)
    y = few_bits.integer_product(a, few_bits.pack(codes, 8), 256, 8)
    assert torch.equal(y.long(), a.long() @ codes.long().t())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "inner"), [(1, 1), (16, 32), (17, 33), (100, 131), (0, 4), (4, 0)])
def test_packing_is_bit_exact_and_small(columns: int, inner: int, bits: int) -> None:
    codes = codes_of(columns, inner, bits)
    words = few_bits.pack(codes, bits)
    assert torch.equal(few_bits.unpack(words, columns, inner, bits), codes)
    assert words.numel() * 32 == -(-columns // 16) * 16 * few_bits.padded_inner(inner, bits) * bits
    per_column = torch.randn(columns, 3)
    assert torch.equal(few_bits.unpack_columns(few_bits.pack_columns(per_column), columns), per_column)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("bits", "table"), [(4, torch.randn(16)), (4, SIGNED), (8, SIGNED)], ids=["any", "int4", "int8"]
)
@pytest.mark.parametrize(
    ("rows", "columns", "inner", "group"),
    [(1, 5, 64, 32), (2, 33, 128, 64), (3, 100, 192, 64), (9, 64, 256, 128), (30, 70, 96, 96), (4, 16, 8, 8)],
)
def test_float_products(
    rows: int, columns: int, inner: int, group: int, bits: int, table: Tensor, shifted: bool, kernels: str
) -> None:
    """Each sum within what float32 sums of so many terms may be off: gamma(k) times the sum of magnitudes."""
    generator = torch.Generator().manual_seed(rows)
    codes = codes_of(columns, inner, bits, seed=rows)
    scale = torch.rand(columns, inner // group, generator=generator) + 0.5
    shift = torch.randn(columns, inner // group, generator=generator) if shifted else None
    x = torch.randn(rows, inner, generator=generator)
    packed = (few_bits.pack_columns(scale), None if shift is None else few_bits.pack_columns(shift))
    words = few_bits.pack(codes, bits)
    y = few_bits.float_product(x, words, table, *packed, columns, bits)
    values = codes.view(torch.int8).double() if bits == 8 else table[codes.int()].double()
    weight = values.view(columns, -1, group) * scale.double().unsqueeze(-1)
    largest = weight.abs()
    if shift is not None:
        weight, largest = weight - shift.double().unsqueeze(-1), largest + shift.double().abs().unsqueeze(-1)
    exact, magnitudes = x.double() @ weight.view(columns, -1).t(), x.double().abs() @ largest.view(columns, -1).t()
    bound = (inner + 3) * torch.finfo(torch.float32).eps / 2 * magnitudes
    assert ((y.double() - exact).abs() <= bound).all()
    rebuilt = few_bits.float_weight(words, table, *packed, columns, inner, bits)
    torch.testing.assert_close(rebuilt.double(), weight.view(columns, -1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_row_only(value: float, kernels: str) -> None:
    x = torch.randn(3, 64)
    x[1, 5] = value
    codes, scale = codes_of(33, 64, 4), few_bits.pack_columns(torch.ones(33, 2))
    y = few_bits.float_product(x, few_bits.pack(codes, 4), SIGNED, scale, None, 33, 4)
    assert torch.isfinite(y[[0, 2]]).all()
    assert not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("inner", [96, 7])
def test_many_rows_are_exact_by_either_product(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if build.library() is None or not integers.cpu_int_mm_is_exact():
        pytest.skip("there is one product only")
    codes, rows = codes_of(37, inner, 8), 300
    a = torch.randint(-128, 128, (rows, inner), dtype=torch.int8)
    asked = []
    for faster in (True, False):
        monkeypatch.setattr(few_bits, "_int_mm_is_faster", lambda faster=faster: asked.append(faster) or faster)
        y = few_bits.integer_product(a, few_bits.pack(codes, 8), 37, 8)
        assert torch.equal(y.long(), a.long() @ codes.long().t())
    assert asked == [True, False]
    few_bits.integer_product(a[:255], few_bits.pack(codes, 8), 37, 8)
    assert asked == [True, False], "with few rows nobody asks"


def test_threads_compute_the_same(kernels: str) -> None:
    before = torch.get_num_threads()
    codes, a = codes_of(200, 256, 2), torch.randint(-128, 128, (40, 256), dtype=torch.int8)
    try:
        torch.set_num_threads(2)
        y = few_bits.integer_product(a, few_bits.pack(codes, 2), 200, 2)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y.long(), a.long() @ codes.long().t())


def test_another_inner_size_is_named() -> None:
    words = few_bits.pack(codes_of(4, 64, 4), 4)
    with pytest.raises(ValueError, match=r"expected 57 to 64 summed columns .* got 72"):
        few_bits.integer_product(torch.zeros(1, 72, dtype=torch.int8), words, 4, 4)
    with pytest.raises(ValueError, match="expected 64 columns of x for these weights, got 72"):
        few_bits.float_product(torch.zeros(1, 72), words, SIGNED, torch.ones(1, 1, 16), None, 4, 4)
    too_long = few_bits.pack(torch.zeros(1, few_bits.MAX_INNER + 1, dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match=f"at most {few_bits.MAX_INNER}"):
        few_bits.integer_product(torch.zeros(1, few_bits.MAX_INNER + 1, dtype=torch.int8), too_long, 1, 1)


@pytest.mark.parametrize("cause", ["no compiler", "a compiler that fails", "a compiler that is gone"])
def test_without_a_compiler_it_is_said(cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'this is no compiler' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    answers = {
        "no compiler": None,
        "a compiler that fails": str(compiler),
        "a compiler that is gone": str(tmp_path / "x"),
    }
    monkeypatch.setattr(build, "cpp_compiler", lambda: answers[cause])
    message = {"no compiler": "no C\\+\\+ compiler was found", "a compiler that fails": "this is no compiler"}
    with pytest.warns(RuntimeWarning, match=message.get(cause, "No such file")):
        assert build.load() is None
    assert not list(tmp_path.glob("fuse_pass/*.so")), "half a library is left"


def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpp_compiler() is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "level", lambda: 0)
    assert build.load() is not None
    monkeypatch.setattr(build, "_compile", lambda command, path: pytest.fail("compiled again"))
    assert build.load() is not None
    (found,) = tmp_path.glob("fuse_pass/*.so")
    monkeypatch.setattr(build, "processor", lambda: "another")
    assert build._path("g++", []) != found
