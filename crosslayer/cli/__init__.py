"""The command line: one file per command, each with HELP, add_arguments(parser) and run(arguments).

These files import nothing heavy until a command runs, so that help and version answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from crosslayer.cli import evaluate, generate, plan, train
from crosslayer.errors import UserError
from crosslayer.version import __version__

COMMANDS = {"plan": plan, "train": train, "generate": generate, "evaluate": evaluate}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="crosslayer", description="Transformers whose layers share their key/value cache."
    )
    parser.add_argument("--version", action="version", version=f"crosslayer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        COMMANDS[arguments.command].run(arguments)
    except UserError as error:
        print(f"crosslayer {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
