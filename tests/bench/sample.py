"""A run of the bench with round figures, made by hand."""

from __future__ import annotations

from fuse_pass.bench.results import Result, Run, Spread

MACHINE = {
    "cpu": "Sample CPU",
    "instructions": "AVX2",
    "threads": "1",
    "torch": "2.13.0",
    "python": "3.11.0",
    "date": "2026-01-02",
}


def spreads(**milliseconds: float) -> dict[str, Spread]:
    """Seconds by contender; underscores in a name stand for what a name cannot have."""
    names = {"stock": "torch.compile", "tuned": "max-autotune", "ours": "fuse_pass", "x2": "x * 2"}
    return {
        names.get(name, name): Spread(1e-3 * value, 0.9e-3 * value, 1.2e-3 * value)
        for name, value in milliseconds.items()
    }


def times_by_ours(seconds: dict[str, Spread]) -> dict[str, float]:
    ours = seconds["fuse_pass"].median
    return {name: spread.median / ours for name, spread in seconds.items() if name != "fuse_pass"}


def row(name: str, seconds: dict[str, Spread], **others: object) -> Result:
    fields: dict[str, object] = {"train": name.endswith("/train"), "rounds": 9} | others
    return Result(name=name, seconds=seconds, time_by_ours=times_by_ours(seconds), **fields)  # type: ignore[arg-type]


def run() -> Run:
    results = [
        row(
            "dropout_norm/8192x768/fp32/train",
            spreads(eager=80, stock=160, ours=10),
            limit_seconds=0.008,
            limited_by="memory",
            saved_bytes={"eager": 50_000_000, "torch.compile": 31_000_000, "fuse_pass": 25_000_000},
            first_call_seconds={"torch.compile": 4.0, "fuse_pass": 4.2},
            fused={"dropout_norm": 1},
        ),
        row(
            "dense_act_dense/512x768x3072/fp32/infer",
            spreads(eager=50, stock=48, freezing=30, tuned=25, ours=24),
            limit_seconds=0.0216,
            limited_by="products",
            first_call_seconds={"torch.compile": 2.0, "freezing": 1.0, "max-autotune": 9.0, "fuse_pass": 3.0},
            fused={"dense_act_dense": 1},
        ),
        row(
            "tiny/bert/infer",
            spreads(eager=0.4, stock=0.09, freezing=0.12, ours=0.1),
            first_call_seconds={"torch.compile": 8.0, "freezing": 8.0, "fuse_pass": 8.0},
            fused={"dense_act_dense": 2, "dropout_norm": 5},
            declined=1,
        ),
        row("numbers/fake_quantize/fp8_e4m3/nearest", spreads(ours=0.9, x2=0.75)),
    ]
    return Run(MACHINE, {"float32": 2.1e11}, 2.55e10, results)
