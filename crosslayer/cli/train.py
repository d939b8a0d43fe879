"""crosslayer train"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from crosslayer.cli.common import (
    add_json_argument,
    add_settings_argument,
    check_json_argument,
    split_settings,
    write_json_output,
)
from crosslayer.errors import UserError

HELP = "train a model from a config file; the same command again continues where it stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings_argument(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder; the model goes to DIR/model")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    file, overrides = split_settings(arguments)
    if file is None:
        raise UserError("want a config file, such as configs/tiny.yaml")
    check_json_argument(arguments)

    from crosslayer.data import prepare
    from crosslayer.settings import load_settings
    from crosslayer.train import TrainConfig, joined_processes, train

    config = load_settings(TrainConfig, file, overrides)
    out = Path(arguments.out)
    with joined_processes(config.train) as processes:
        data = processes.first_alone(lambda: prepare(config.data))
        result = train(config, data, out, processes=processes)
        if processes.first:
            _report(result, arguments.json, out)


def _report(result: dict[str, Any], json: str | None, out: Path) -> None:
    if json:
        write_json_output(json, result)
    if json != "-":
        held_out = result["validation"]
        print(
            f"{result['parameters']:,} parameters, {result['tokens']:,} tokens in {result['seconds']:.0f} s\n"
            f"held-out loss {held_out['loss']:.4f}, perplexity {held_out['perplexity']:.2f}, "
            f"{held_out['bits_per_byte']:.4f} bits per byte over {held_out['tokens']:,} tokens\n"
            f"model: {out / 'model'}"
        )
