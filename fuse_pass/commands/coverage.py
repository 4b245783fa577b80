"""`coverage`: what would be fused in models, a row per model and mode."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from fuse_pass.commands.named_models import reports
from fuse_pass.patterns import PATTERNS


def run(options: argparse.Namespace) -> None:
    rows = []
    for name, mode, report in reports(options.names):
        counts = report.counts()
        fused = [counts[pattern.name] for pattern in PATTERNS]
        rows.append([name, mode, report.graphs, *fused, len(report.declines)])
        if options.details:
            print(f"{name}, {mode}: {report}\n")
    headers = ["model", "mode", "graphs", *(pattern.name for pattern in PATTERNS), "declined"]
    print(tabulate(rows, headers=headers, tablefmt=options.format))
