"""The table of docs/works-with.md, between two marks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass

import torch
from tabulate import tabulate

from fuse_pass.gemm.machine import cpu_name

ROW = "works with"
START, END = "<!-- rows -->\n", "<!-- end of rows -->\n"
HEADERS = ("tool", "version", "what was run", "what was fused", "agreement with eager")


@dataclass(frozen=True, order=True)
class Row:
    """One line of the table, in its order."""

    tool: str
    version: str
    ran: str
    fused: str
    agreement: str

    def to_json(self) -> str:
        """For the report of a test, which may come from another process."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Row:
        return cls(**json.loads(text))


def written(page: str, rows: Sequence[Row]) -> str:
    """The page with these rows instead of the ones it had.

    Raises:
        ValueError: a page without the marks, or no rows.
    """
    if not rows:
        raise ValueError("expected rows for the page, got none: were the tests of tests/integrations run?")
    before, mark, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"expected a page with {START.strip()} and {END.strip()}")
    table = tabulate([astuple(row) for row in sorted(rows)], headers=HEADERS, tablefmt="github", disable_numparse=True)
    machine = f"torch {torch.__version__}, {cpu_name()}."
    return f"{before}{START}\n{machine}\n\n{table}\n\n{END}{after}"
