"""What `bench` measured, as data that a file can hold."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuse_pass.commands.errors import CommandError
from fuse_pass.commands.timing import ratio

EAGER, STOCK, FREEZING, MAX_AUTOTUNE, OURS = "eager", "torch.compile", "freezing", "max-autotune", "fuse_pass"
COMPILED_ALTERNATIVES = (STOCK, FREEZING, MAX_AUTOTUNE)
_VERSION = 1


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: the median, and the quartiles around it."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Result:
    """One row.

    Attributes:
        name: of the row.
        train: whether backward is part of it.
        rounds: how often every contender ran.
        seconds: by contender.
        time_by_ours: time of a contender divided by that of fuse_pass, the median over rounds.
        limit_seconds: in which this machine could do it at best; None where there is no such limit.
        limited_by: "products" or "memory".
        saved_bytes: kept from forward to backward, by contender.
        first_call_seconds: by compiled contender, from empty caches.
        fused: occurrences by pattern.
        declined: candidates that were left alone.
        errors: relative, of the results against those in float64, by contender; where others took part (`--against`).
        absent: why one of those did not, by contender.
        eager_apart: seconds of eager PyTorch in the process of a contender that has one of its own. `time_by_ours` is
            then its time by that of eager there, times eager's by ours here.
    """

    name: str
    train: bool
    rounds: int
    seconds: dict[str, Spread]
    time_by_ours: dict[str, float]
    limit_seconds: float | None = None
    limited_by: str | None = None
    saved_bytes: dict[str, int] = field(default_factory=dict)
    first_call_seconds: dict[str, float] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    declined: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    eager_apart: dict[str, float] = field(default_factory=dict)

    @property
    def others(self) -> dict[str, float]:
        """`time_by_ours` of those who took part by `--against`."""
        return {name: by for name, by in self.time_by_ours.items() if name in self.errors and name != EAGER}

    @property
    def best_compiled(self) -> str | None:
        """The fastest alternative that is compiled; None where there is none."""
        compiled = {name: by for name, by in self.time_by_ours.items() if name in COMPILED_ALTERNATIVES}
        return min(compiled, key=compiled.__getitem__, default=None)

    @property
    def is_cost(self) -> bool:
        """Whether it says what something costs (against a baseline), not how much faster it is."""
        return STOCK not in self.seconds

    @property
    def baseline(self) -> str:
        return next(name for name in self.seconds if name != OURS)

    @property
    def share_of_limit(self) -> float | None:
        """The limit's time divided by ours; 1 is the fastest that this machine can be."""
        return None if self.limit_seconds is None else self.limit_seconds / self.seconds[OURS].median


@dataclass(frozen=True)
class Run:
    """One run of the command.

    Attributes:
        machine: what it was measured on, by name of the property.
        product_rates: FLOP/s of the fastest matrix product, by dtype.
        copy_rate: bytes read and written per second by a large copy.
        results: the rows.
    """

    machine: dict[str, str]
    product_rates: dict[str, float]
    copy_rate: float
    results: list[Result]


def timed(samples: Mapping[str, list[float]]) -> dict[str, Any]:
    """The fields of a `Result` that samples give."""
    return {
        "rounds": len(samples[OURS]),
        "seconds": {name: spread(values) for name, values in samples.items()},
        "time_by_ours": {name: ratio(samples, name, OURS) for name in samples if name != OURS},
    }


def spread(values: list[float]) -> Spread:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def write(run: Run, path: Path) -> None:
    """Writes a run as JSON, a line per row; seconds, bytes and FLOP are named in the keys, numbers have 4 digits."""
    head = {
        "version": _VERSION,
        "machine": run.machine,
        "product_rates_flop_per_second": run.product_rates,
        "copy_rate_bytes_per_second": run.copy_rate,
    }
    fields = [f' "{key}": {_text(value)}' for key, value in head.items()]
    rows = ",\n".join(f"  {_text(dataclasses.asdict(result))}" for result in run.results)
    path.write_text("{\n" + ",\n".join([*fields, f' "results": [\n{rows}\n ]']) + "\n}\n")


def _text(value: Any) -> str:
    return json.dumps(_rounded(value), ensure_ascii=False)


def read(path: Path) -> Run:
    """Reads what `write` wrote.

    Raises:
        CommandError: the file is absent or something else.
    """
    try:
        content = json.loads(path.read_text())
        if content["version"] != _VERSION:
            raise CommandError(f"{path}: expected version {_VERSION}, got {content['version']}; run bench again")
        results = [
            Result(**row | {"seconds": {name: Spread(**spread) for name, spread in row["seconds"].items()}})
            for row in content["results"]
        ]
        rates = content["product_rates_flop_per_second"]
        return Run(content["machine"], rates, content["copy_rate_bytes_per_second"], results)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}; bench --json {path} writes it") from error
    except (ValueError, TypeError, LookupError) as error:
        raise CommandError(f"{path}: expected what bench --json writes, got something else ({error})") from error


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
