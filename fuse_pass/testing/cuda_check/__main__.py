"""`python -m fuse_pass.testing.cuda_check [--minutes 8] [--json FILE] [--sections NAME …] [--device cuda] [--small]`.

Prints a line for each row and appends it to FILE as a line of JSON at once. A row that fails says why, and the next one
runs; after the minutes no new row is begun. The exit status is 0 where every row that ran is right and fast enough.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fuse_pass.testing.cuda_check.sections import SECTIONS, Row, Scale


def rows(names: Sequence[str], scale: Scale, seconds: float) -> Iterator[Row]:
    """Of the sections, in order; of a section that raises, what it raised; of one that time forbids, that it did."""
    end = time.monotonic() + seconds
    for name in names:
        for row in _until_it_fails(SECTIONS[name](scale)):
            yield {"section": name, **row}
            if time.monotonic() > end:
                yield {"section": name, "case": "the rest", "ok": False, "error": "no time left; pass more --minutes"}
                return


def _until_it_fails(section: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from section
    except Exception as error:  # told as a row: the other sections still run
        trace = "".join(traceback.format_exception(error))
        yield {"case": "the rest", "ok": False, "error": f"{type(error).__name__}: {error}", "trace": trace}


def _told(row: Row) -> str:
    shown = {name: value for name, value in row.items() if name not in ("section", "case", "ok", "trace")}
    facts = "  ".join(f"{name}={_short(value)}" for name, value in shown.items())
    return f"{'ok  ' if row['ok'] else 'FAIL'} {row['section']:13} {row['case']}  {facts}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(inner)}" for name, inner in value.items()) + "}"
    return f"[{', '.join(map(_short, value))}]" if isinstance(value, list) else str(value)


def _writer(path: Path | None) -> Callable[[Row], None]:
    def write(row: Row) -> None:
        print(_told(row), flush=True)
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    return write


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuse_pass.testing.cuda_check", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no new row is begun")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where rows are appended, a line of JSON each")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true", help="sizes at which the check itself can be tried")
    given = parser.parse_args(arguments)
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, and PyTorch finds none; --device cpu --small tries the check itself")
    scale = Scale.small(given.device) if given.small else Scale(given.device)
    write, all_right = _writer(given.json), True
    for row in rows(given.sections, scale, 60 * given.minutes):
        write(row)
        all_right = all_right and row["ok"]
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
