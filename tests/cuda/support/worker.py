"""`python -m tests.cuda.support.worker HOOKS GROUP ROWS CASE…`: a group of checks in a process of its own.

The hooks must be there before torch, so nothing above imports it. Of every case a line of JSON is appended to ROWS as
soon as it is known: what the group's `check(case)` returns, or the error that it raises.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

from tests.cuda.support import hooks


def main(library: str, group: str, rows: str, *cases: str) -> None:
    hooks.load(Path(library))
    importlib.import_module("tests.cuda.support.device").install()
    check = importlib.import_module(f"tests.cuda.support.{group}").check
    with Path(rows).open("a") as file:
        for case in cases:
            try:
                found = {"result": check(case)}
            except Exception:  # told to the test, which fails with it
                found = {"error": traceback.format_exc()}
            print(json.dumps({"case": case, **found}), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
