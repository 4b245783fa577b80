"""The tables that a run gives."""

from __future__ import annotations

from fuse_pass.bench.results import Run
from fuse_pass.bench.tables import tables
from tests.bench import sample


def cells(text: str, first: str) -> list[str]:
    """The cells of the only line of a github table that begins with a word."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_speed_rows() -> None:
    text = tables(sample.run(), "github")
    assert cells(text, "dropout_norm/8192x768/fp32/train")[1:] == [
        "80.00", "160", "–", "10.00", "8.00×", "16.00×", "16.00×", "80%", "25.00 / 50.00", "4.2 / 4.0",
    ]  # fmt: skip
    assert cells(text, "dense_act_dense/512x768x3072/fp32/infer")[1:] == [
        "50.00", "48.00", "25.00 max-autotune", "24.00", "2.08×", "2.00×", "1.04×", "90%", "–", "3.0 / 2.0",
    ]  # fmt: skip
    assert cells(text, "tiny/bert/infer")[1:] == [
        "0.400", "0.090", "–", "0.100", "4.00×", "0.90×", "0.90×", "–", "–", "8.0 / 8.0",
    ]  # fmt: skip


def test_cost_rows_and_machine() -> None:
    text = tables(sample.run(), "github")
    assert cells(text, "numbers/fake_quantize/fp8_e4m3/nearest")[1:] == ["0.900", "x * 2", "0.750", "1.20×"]
    assert "Measured on Sample CPU (AVX2), 1 thread, torch 2.13.0, Python 3.11.0, 2026-01-02" in text
    assert "copy 25.5 GB/s, products 210 GFLOP/s float32" in text


def test_targets_are_judged() -> None:
    lines = tables(sample.run(), "github").splitlines()

    def verdict(aim: str, rows: str) -> str:
        (line,) = (line for line in lines if line.startswith(f"| {rows} ") and f"| {aim} " in line)
        return line.strip("| ").split("|")[-1].strip()

    assert verdict("× torch.compile ≥ 10", "dropout_norm/8192x768/*/train") == "reached"
    assert verdict("share of the limit ≥ 0.9", "dense_act_dense/*/fp32/infer") == "reached"
    beyond = verdict("× best alternative ≥ 2.1", "dense_act_dense/*/fp32/infer")
    assert beyond == "beyond the limit, which allows 1.16 (90% of it reached)", "25 ms against 21.6"
    assert verdict("× best torch.compile ≥ 0.97", "tiny/*") == "not reached"
    assert verdict("first call / torch.compile's ≤ 1.1", "*") == "not reached"


def test_only_what_was_measured_is_shown() -> None:
    run = sample.run()
    speeds = tables(Run(run.machine, {}, run.copy_rate, run.results[:1]), "simple")
    assert "takes" not in speeds
    assert "products" not in speeds.splitlines()[-1]
    costs = tables(Run(run.machine, {}, run.copy_rate, run.results[3:]), "simple")
    assert "takes" in costs
    assert "first call" not in costs
