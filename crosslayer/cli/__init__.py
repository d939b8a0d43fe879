"""The command line: one file per command, each with HELP, add_arguments(parser) and run(arguments).

These files import nothing heavy until a command runs, so that help and version answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from crosslayer.cli import compare, evaluate, export, generate, plan, serve, train
from crosslayer.errors import Stopped, UserError
from crosslayer.files import say
from crosslayer.version import __version__

COMMANDS = {
    "plan": plan,
    "train": train,
    "export": export,
    "compare": compare,
    "generate": generate,
    "evaluate": evaluate,
    "serve": serve,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's mistake, 128 + the signal that ended it early."""
    parser = _Parser(prog="crosslayer", description="Transformers whose layers share their key/value cache.")
    parser.add_argument("--version", action="version", version=f"crosslayer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parsers = {name: commands.add_parser(name, help=module.HELP) for name, module in COMMANDS.items()}
    given = sys.argv[1:] if argv is None else [*argv]
    if not given or given[0] not in COMMANDS:
        parser.parse_args(given[:1])  # help, the version or an error: all of them end here
    module, command = COMMANDS[given[0]], parsers[given[0]]
    command.description = module.HELP
    module.add_arguments(command)
    arguments = command.parse_intermixed_args(given[1:])  # options may stand anywhere
    status = 128 + signal.SIGPIPE
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"{command.prog}: warning: {message}")
            module.run(arguments)
        status = 0
        sys.stdout.flush()
    except UserError as error:
        say(f"{command.prog}: {error}")
        status = 2
    except Stopped as stopped:
        if str(stopped):
            say(f"{command.prog}: {stopped}")
        status = 128 + signal.SIGTERM
    except KeyboardInterrupt:
        say("\ninterrupted")
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output, such as head, has gone; no matter if the work was done
        pass
    except OSError as error:  # a file or a disk that is not as the command needs it
        say(f"{command.prog}: {error}")
        status = 2
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try once more at its end, and change the status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status
