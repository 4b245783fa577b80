"""`explain`: the candidates that would not be replaced, why, and what can be done about it."""

from __future__ import annotations

import argparse
from collections import Counter

from tabulate import tabulate

from fuse_pass.commands.named_models import reports
from fuse_pass.report import ADVICE, Reason


def run(options: argparse.Namespace) -> None:
    reasons: Counter[Reason] = Counter()
    for name, mode, report in reports(options.names):
        print(f"{name}, {mode}: {sum(report.counts().values())} fused, {len(report.declines)} declined")
        rows = [[d.pattern, d.where, d.source, d.node, str(d.reason), d.detail] for d in report.declines]
        if rows:
            print(tabulate(rows, headers=["pattern", "where", "source", "node", "reason", "detail"]) + "\n")
        for note in report.notes:
            print(f"{note}\n")
        reasons.update(decline.reason for decline in report.declines)
    if reasons:
        advice = [[times, str(reason), ADVICE[reason]] for reason, times in reasons.most_common()]
        print("\n" + tabulate(advice, headers=["times", "reason", "what can be done"]))
