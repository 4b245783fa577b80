"""The command line: `python -m fuse_pass demo | coverage | explain | bench | probe`, also installed as `fuse-pass`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fuse_pass.bench import command as bench
from fuse_pass.commands import coverage, demo, explain, probe
from fuse_pass.commands.errors import CommandError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 after a message where the user's input was wrong."""
    parser = argparse.ArgumentParser(prog="fuse-pass", description="A fusion pass for torch.compile.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (demo, coverage, explain, bench, probe):
        command = commands.add_parser(module.NAME, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())  # models named on the command line are looked for here, as `python -m` does
    try:
        options.run(options)
    except CommandError as error:
        print(f"fuse-pass {options.command}: {error}", file=sys.stderr)
        return 2
    return 0
