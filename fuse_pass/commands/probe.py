"""`probe`: what was measured of this machine's libraries, and with `--renew` measured anew."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from fuse_pass.gemm import measured, probe
from fuse_pass.gemm.machine import cpu_name, instruction_set


def run(options: argparse.Namespace) -> None:
    if options.renew:
        measured.forget()
    table = measured.table()
    rows = []
    for question in probe.QUESTIONS:
        flop = table.get(question.name)
        verdict = "PyTorch's own choice" if flop is None else f"oneDNN from {flop / 1e6:.0f} MFLOP on"
        rows.append([question.name, " x ".join(map(str, question.sizes)), verdict])
    print(f"{cpu_name()}, {instruction_set()}")
    print(tabulate(rows, headers=["product", "measured with", "computed by"]))
    print(f"kept in {measured.cache_file()}")
