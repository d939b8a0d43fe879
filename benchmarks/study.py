"""The study of docs/study.md, run by run: train, evaluate, and append a line to the results, within a time limit.

    python -m benchmarks.study noise tune data.paths=[train.jsonl.xz] data.valid_paths=[valid.jsonl.xz] \\
        --task-data eval --minutes 8

Names of stages (configs/study/stages.yaml; none: all, in their order) and key=value settings over the config may be
mixed. A run that the results have already is skipped: the same model, recipe, seed, rate and data. A run starts only
if the slowest so far would end within the limit. A run whose loss is no longer a number is recorded as that.

The same command may run several times at once, with a GPU each (CUDA_VISIBLE_DEVICES) or several on one, which then
has work while one of them compiles or evaluates: a run that another process is at is left to it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from crosslayer import checkpoint
from crosslayer.compare import CompareConfig
from crosslayer.compare.config import design_folder
from crosslayer.data import PreparedData, prepare
from crosslayer.environment import describe_environment
from crosslayer.errors import Diverged, UserError
from crosslayer.evaluate import TASKS, score_recall, score_tasks
from crosslayer.evaluate.perplexity import document_losses
from crosslayer.evaluate.uncertainty import ratio_and_error
from crosslayer.files import claimed, read_json
from crosslayer.plan.cost import kv_bytes
from crosslayer.settings import load_settings, to_mapping
from crosslayer.train import TrainConfig, train
from crosslayer.train.config import MAY_CHANGE
from crosslayer.train.host import autocast, choose_device
from crosslayer.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "study" / "compare.yaml"
STAGES = ROOT / "configs" / "study" / "stages.yaml"
RESULTS = ROOT / "docs" / "results" / "study.jsonl"
TUNING_FACTOR = 1.5


class OutOfTime(Exception):
    """The next run would not end within the limit."""


@dataclass(frozen=True)
class Stage:
    """Every design with every seed; with `tune`, at rates from the config's up until the held-out loss is no lower, and
    if it never was, down likewise."""

    designs: tuple[str, ...]
    seeds: tuple[int, ...]
    tune: bool = False


@dataclass(frozen=True)
class Plan:
    """The stages by name, in the order in which they are to be run."""

    stages: dict[str, Stage]


class Study:
    """The results so far, and how a run is added to them."""

    def __init__(self, config: CompareConfig, arguments: argparse.Namespace) -> None:
        self.config = config
        self.arguments = arguments
        self.started = time.monotonic()
        self.slowest = 0.0
        self.device = choose_device(config.train.device)
        self.data = prepare(config.data)
        self.fingerprint = content_fingerprint(self.data)

    def run_stage(self, stage: Stage) -> None:
        for seed in stage.seeds:
            for design in stage.designs:
                training = self.config.training(design, seed)
                if stage.tune:
                    self.tune(design, training)
                else:
                    self.run(design, training)

    def tune(self, design: str, training: TrainConfig) -> None:
        """Find a rate with neighbours that are no better; what another process trains is left to it."""
        start = self.config.train.learning_rate
        lowest = self.run(design, at_rate(training, start))
        if lowest is None:
            return
        for factor in (TUNING_FACTOR, 1 / TUNING_FACTOR):
            before, rate = lowest, rounded(start * factor)
            while (loss := self.run(design, at_rate(training, rate))) is not None and loss < lowest:
                lowest, rate = loss, rounded(rate * factor)
            if loss is None or lowest < before:
                return

    def run(self, design: str, training: TrainConfig) -> float | None:
        """The held-out loss of a run (infinity where it diverged), from the results, or trained now and added to them;
        None if another process is training it.

        Raises:
            OutOfTime: it would have to be trained, and there is no time for it.
            UserError: it cannot be trained, for another reason than its loss.
        """
        recipe = training.train
        settings = comparable(training) | {"data": self.fingerprint}
        name = f"{design_folder(design)}-seed-{recipe.seed}-rate-{recipe.learning_rate:g}"
        folder = self.arguments.runs / f"{name}-{short_hash(settings)}"
        with claimed(folder.with_name(f"{folder.name}.lock")) as mine:
            row = next((row for row in read_rows(self.arguments.results) if row["settings"] == settings), None)
            if row is None and not mine:
                return None
            if row is None:
                started = time.monotonic()
                limit = self.arguments.minutes
                if limit is not None and started - self.started + self.slowest > limit * 60:
                    raise OutOfTime
                row = {"design": design, "seed": recipe.seed, "learning_rate": recipe.learning_rate}
                row |= {"tokens": recipe.steps * recipe.tokens_per_step, "commit": self.arguments.commit}
                row |= {"runs_on_gpu": self.arguments.runs_on_gpu}
                row |= {**self._result(training, folder), "settings": settings, "environment": describe_environment()}
                self.slowest = max(self.slowest, time.monotonic() - started)
                with self.arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(describe(row), flush=True)
        return row["validation"]["loss"] if "validation" in row else math.inf

    def _result(self, training: TrainConfig, folder: Path) -> dict[str, Any]:
        recipe = training.train
        try:
            trained = train(training, self.data, folder, label=folder.name)
        except Diverged as error:
            return {"error": str(error)}
        started = time.monotonic()
        model = checkpoint.load(folder / "model", device=self.device)
        tokenizer, context = self.data.tokenizer, recipe.sequence_length
        with autocast(self.device, recipe.precision):
            _, standard_error = ratio_and_error(
                *document_losses(model, self.data.valid, sequence_length=context, eos_id=tokenizer.eos_id)
            )
            tasks = {}
            if self.arguments.task_data is not None:
                names = self.arguments.tasks.split(",")
                tasks = score_tasks(model, tokenizer, self.arguments.task_data, names, items=self.arguments.task_items)
            recall = score_recall(model, tokenizer)
        return {
            "parameters": trained["parameters"],
            "kv_bytes_per_token": kv_bytes(model.config, context) / context,
            "validation": {**trained["validation"], "standard_error": standard_error},
            "course": {
                str(line["step"]): line["validation_loss"] for line in read_metrics(folder) if "validation_loss" in line
            },
            "tasks": {task: asdict(score) for task, score in tasks.items()},
            "recall": [asdict(result) for result in recall],
            "seconds": trained["seconds"],
            "evaluation_seconds": time.monotonic() - started,
        }


def rounded(rate: float) -> float:
    return float(f"{rate:.4g}")


def at_rate(training: TrainConfig, rate: float) -> TrainConfig:
    return replace(training, train=replace(training.train, learning_rate=rate))


def comparable(training: TrainConfig) -> dict[str, Any]:
    """The model and recipe of a run, without what does not change its result, as JSON has them."""
    recipe = {key: value for key, value in to_mapping(training.train).items() if f"train.{key}" not in MAY_CHANGE}
    settings: dict[str, Any] = json.loads(json.dumps({"model": training.model, "train": recipe}))
    return settings


def content_fingerprint(data: PreparedData) -> str:
    """Names the tokens of both splits as the recorded results do; `data.fingerprint` does it in another way."""
    index = read_json(data.folder / "index.json")
    content = [[shard["crc32"] for shard in index[split]] for split in ("train", "valid")]
    return short_hash(content)


def short_hash(data: Any) -> str:
    return hashlib.blake2b(json.dumps(data).encode(), digest_size=6).hexdigest()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The runs that are in a results file; none where there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def describe(row: dict[str, Any]) -> str:
    """A line for those who wait."""
    name = f"{row['design']:40} seed {row['seed']}  rate {row['learning_rate']:<8g}"
    if "error" in row:
        return f"{name} {row['error']}"
    found = [f"loss {row['validation']['loss']:.4f}"]
    for task, score in row["tasks"].items():
        found += [f"{task} {metric['value']:.3f}" for kind, metric in score["metrics"].items() if kind == "acc"]
    found.append(f"recall {sum(result['accuracy'] for result in row['recall']) / len(row['recall']):.3f}")
    return "  ".join([name, *found, f"{row['seconds']:.0f} + {row['evaluation_seconds']:.0f} s"])


def this_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE|key=value")
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE")
    parser.add_argument("--stages-file", type=Path, default=STAGES, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="where models go")
    parser.add_argument("--minutes", type=float, help="time limit")
    parser.add_argument(
        "--runs-on-gpu",
        type=int,
        default=1,
        metavar="N",
        help="of these commands share a GPU (for the account of time)",
    )
    parser.add_argument("--task-data", type=Path, metavar="DIR", help="the task sets' files (none: no tasks)")
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="A,B,...", help="(default: all)")
    parser.add_argument("--task-items", type=int, metavar="N", help="N items of each set (default: all)")
    parser.add_argument("--commit", default=this_commit(), help="of the code (default: asked of git)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.commit is None:
        parser.error("this is no git checkout; say with --commit which commit it is")
    if arguments.runs_on_gpu < 1:
        parser.error("--runs-on-gpu: at least 1")
    names, settings = ([s for s in arguments.stages if ("=" in s) == wanted] for wanted in (False, True))
    try:
        config = load_settings(CompareConfig, arguments.config, settings)
        stages = load_settings(Plan, arguments.stages_file).stages
        for name in names or stages:
            if name not in stages:
                raise UserError(f"no stage {name!r}; stages: {', '.join(stages)}")
            for design in set(stages[name].designs) - set(config.designs):
                raise UserError(f"stage {name}: {design!r} is not among the designs of {arguments.config}")
        study = Study(config, arguments)
        for name in names or stages:
            study.run_stage(stages[name])
    except OutOfTime:
        print("out of time; the same command goes on from here", file=sys.stderr)
    except UserError as error:
        parser.exit(2, f"study.py: {error}\n")


if __name__ == "__main__":
    main()
