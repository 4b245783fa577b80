"""The command line: `python -m fuse_pass demo | coverage | explain | bench | probe`, also installed as `fuse-pass`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from fuse_pass.commands.arguments import COMMANDS
from fuse_pass.commands.errors import CommandError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 after a message where the user's input was wrong."""
    parser = argparse.ArgumentParser(prog="fuse-pass", description="A fusion pass for torch.compile.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(module=command.module)
    options = parser.parse_args(arguments)
    run = importlib.import_module(options.module).run  # Dynamo and Inductor with it, which nobody needs for `--help`
    sys.path.insert(0, os.getcwd())  # models named on the command line are looked for here, as `python -m` does
    try:
        run(options)
    except CommandError as error:
        print(f"fuse-pass {options.command}: {error}", file=sys.stderr)
        return 2
    return 0
