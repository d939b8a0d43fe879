"""crosslayer export"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "turn a checkpoint of a training run into a model folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", help="output folder of crosslayer train")
    parser.add_argument("--out", required=True, metavar="MODEL_DIR", help="where the model folder goes")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")


def run(arguments: argparse.Namespace) -> None:
    from crosslayer.train.export import export

    step = export(Path(arguments.run), Path(arguments.out), arguments.step)
    print(f"step {step}: {arguments.out}")
