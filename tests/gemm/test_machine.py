"""What a processor is called: the same on every call, and different for processors of one name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuse_pass.gemm import machine

ZEN3 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu sse2 sse4_2 smep fma f16c avx2 avx

processor\t: 1
model name\t: AMD EPYC
"""
ZEN5 = ZEN3.replace(": 25", ": 26").replace("avx2 avx", "avx2 avx avx512f avx512_bf16 avx_vnni")
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp sve bf16 i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    machine.cpu_name.cache_clear()
    machine.processor.cache_clear()
    yield
    machine.cpu_name.cache_clear()
    machine.processor.cache_clear()


def processor_of(text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    machine.cpu_name.cache_clear()
    machine.processor.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    return machine.processor()


def test_processors_of_one_name_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processor_of(ZEN3, monkeypatch) == "AMD EPYC, 25, 1, avx avx2 f16c fma sse4_2"
    assert machine.cpu_name() == "AMD EPYC"
    assert processor_of(ZEN5, monkeypatch) == ("AMD EPYC, 26, 1, avx avx2 avx512_bf16 avx512f avx_vnni f16c fma sse4_2")
    assert machine.cpu_name() == "AMD EPYC"


def test_other_kinds_of_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "processor", lambda: "aarch64")
    assert processor_of(ARM, monkeypatch) == "aarch64, 0x41, 0xd4f, asimd asimdhp bf16 i8mm sve"
    assert processor_of("", monkeypatch) == "aarch64, "
    assert processor_of("no colon\n: no name\n\n\n", monkeypatch) == "aarch64, "


def test_where_the_system_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "riscv64")
    assert machine.processor() == "riscv64, "


def test_this_one() -> None:
    assert machine.processor() == machine.processor()
    assert machine.processor().startswith(machine.cpu_name())
    assert machine.instruction_set()
