"""crosslayer compare"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from crosslayer.cli.common import (
    add_json_argument,
    add_settings_argument,
    check_json_argument,
    split_settings,
    write_json_output,
)
from crosslayer.environment import started_processes
from crosslayer.errors import UserError

HELP = "train several designs under one budget and show what each saves and costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train several sharing designs on the same text, in the same order, and compare cache bytes and held-out loss: "
        "a table, and in DIR results.json, plots, report.html and the trained models. Without CONFIG, three small "
        "designs on the Python standard library's sources. The same command again continues where it stopped; a design "
        "that fails is reported, does not stop the others, and makes the exit status 1."
    )
    add_settings_argument(parser)
    parser.add_argument("--out", default="runs/compare", metavar="DIR", help="output folder (default: %(default)s)")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    file, overrides = split_settings(arguments)
    check_json_argument(arguments)
    if started_processes() > 1:
        raise UserError("a comparison runs in one process; torchrun is for crosslayer train")

    from crosslayer.compare import CompareConfig, compare, format_table
    from crosslayer.compare.config import DEFAULT
    from crosslayer.compare.table import describe_sample
    from crosslayer.settings import load_settings, to_mapping

    config = load_settings(CompareConfig, file or DEFAULT, overrides)
    out = Path(arguments.out)
    command = shlex.join(["crosslayer", "compare", *arguments.settings, "--out", arguments.out])
    results = compare(config, out, command=command)
    if arguments.json:
        write_json_output(arguments.json, to_mapping(results))
    if arguments.json != "-":
        print(format_table(results))
        if sample := results.sample:
            print(f"\n{describe_sample(results, sample)}\n\n{sample.prompt}{sample.text}")
        print(f"\nreport: {out / 'report.html'}")
    if results.failures:
        sys.exit(1)
