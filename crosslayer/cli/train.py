"""crosslayer train"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslayer.cli.common import (
    add_json_argument,
    add_settings_argument,
    check_json_argument,
    split_settings,
    write_json_output,
)
from crosslayer.environment import started_processes
from crosslayer.errors import UserError

if TYPE_CHECKING:
    from crosslayer.train import TrainConfig

HELP = "train a model from a config file; the same command again continues where it stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings_argument(parser)
    parser.add_argument("--out", metavar="DIR", help="output folder; the model goes to DIR/model")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print what the run costs, and train nothing")
    instead.add_argument("--prepare", action="store_true", help="prepare the data for later runs, and train nothing")
    parser.add_argument("--gpus", type=int, metavar="N", help="dry run: for N GPUs (default: the processes there are)")
    parser.add_argument("--tflops", type=float, metavar="X", help="dry run: at X TFLOP/s a GPU (default: an H100's)")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    file, overrides = split_settings(arguments)
    if file is None:
        raise UserError("want a config file, such as configs/tiny.yaml")
    if not arguments.dry_run and (arguments.gpus is not None or arguments.tflops is not None):
        raise UserError("--gpus and --tflops go with --dry-run; a run uses the processes that it is started with")
    if not (arguments.out or arguments.dry_run or arguments.prepare):
        raise UserError("want --out DIR, the folder for the model and what belongs to the run")
    check_json_argument(arguments)

    from crosslayer.data import prepare
    from crosslayer.settings import load_settings
    from crosslayer.train import TrainConfig, joined_processes, train

    config = load_settings(TrainConfig, file, overrides)
    if arguments.dry_run:
        _dry_run(config, arguments)
        return
    if arguments.prepare:
        print(prepare(config.data).folder)
        return
    with joined_processes(config.train) as processes:
        data = processes.first_alone(lambda: prepare(config.data))
        result = train(config, data, Path(arguments.out), processes=processes)
        if processes.first:
            _report(result, arguments.json, Path(arguments.out))


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
        troubles = ("skipped_steps", "spikes", "failed_checkpoints")
        if found := [f"{name.replace('_', ' ')} {result[name]}" for name in troubles if result[name]]:
            print("to look into: " + ", ".join(found))


def _dry_run(config: TrainConfig, arguments: argparse.Namespace) -> None:
    from crosslayer.cli.dry_run import MEASURED_TFLOPS, dry_run, report

    gpus = started_processes() if arguments.gpus is None else arguments.gpus
    figures = dry_run(config, gpus=gpus, tflops=MEASURED_TFLOPS if arguments.tflops is None else arguments.tflops)
    if arguments.json:
        write_json_output(arguments.json, figures)
    if arguments.json != "-":
        print(report(figures))
