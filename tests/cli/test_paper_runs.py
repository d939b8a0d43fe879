"""configs/paper: the paper's runs as a table, two configs and a Slurm script."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from crosslayer.cli.dry_run import dry_run
from crosslayer.data import DataConfig
from crosslayer.plan import parse_design, preset
from crosslayer.plan.cost import num_parameters
from crosslayer.settings import load_settings
from crosslayer.train import TrainConfig
from tests.plan.test_presets import TABLE_1

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "configs" / "paper"
with (PAPER / "runs.tsv").open(encoding="utf-8") as file:
    RUNS = list(csv.DictReader(file, delimiter="\t"))


def load(run: dict[str, str]) -> TrainConfig:
    settings = [f"model.design={run['design']}", f"train.learning_rate={run['learning_rate']}"]
    return load_settings(TrainConfig, PAPER / f"{run['config']}.yaml", settings)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["run"])
def test_a_run_is_the_papers(run: dict[str, str]) -> None:
    config = load(run)
    recipe = config.train
    small = run["config"] == "1b"
    assert recipe.tokens == (30e9 if small else 100e9)
    assert (recipe.batch_size, recipe.sequence_length) == (2048, 2048)
    assert (recipe.betas, recipe.weight_decay, recipe.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert (recipe.warmup_ratio, recipe.final_ratio, recipe.precision) == (0.05, 0.1, "bf16")
    assert recipe.learning_rate == float(run["learning_rate"])
    assert config.data == DataConfig(
        "huggingface",
        "cerebras/SlimPajama-627B",
        valid_paths="cerebras/SlimPajama-627B::validation",
        max_bytes=150 * 10**9 if small else 500 * 10**9,
        tokenizer="tokenizers/gpt-neox-20b",
    )
    figures = dry_run(config, gpus=8)
    assert figures["kv_bytes_per_token"] == int(run["kv_bytes_per_token"])
    assert figures["vocab_size"] == 50304
    assert figures["parameters"] == num_parameters(parse_design(run["design"], preset(f"paper-{run['config']}")))
    assert figures["memory"]["peak"] < 72 * 2**30  # on 80 GB with room for what is not counted


def test_the_table_is_whole() -> None:
    table_1 = [run for run in RUNS if run["run"] == f"1b-{run['design']}"]
    paper = [(row.split()[0], row.split()[-1]) for row in TABLE_1.strip().splitlines()]
    assert [(run["design"], run["kv_bytes_per_token"]) for run in table_1] == paper
    assert {run["learning_rate"] for run in table_1} == {"3e-4"}
    kinds = Counter((run["config"], run["run"].rpartition("-")[2]) for run in RUNS if run not in table_1)
    assert kinds == {("1b", "tuned"): 3, ("3b", "tuned"): 3, ("3b", "second"): 3}
    assert len({run["run"] for run in RUNS}) == len(RUNS) == 29


TOOLS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "scontrol $*"; fi',
    "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16 exec "$@"',
    "crosslayer": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR" "$@"; exit ${STATUS:-0}',
}


def slurm(folder: Path, task: int, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """The script with stand-ins for Slurm's tools and for `crosslayer`, which says how it was called."""
    for name, content in TOOLS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{content}\n")
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_JOB_ID": "70001",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "STATUS": str(status),
    }
    command = ["bash", str(PAPER / "slurm.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@needs_bash
@pytest.mark.parametrize("task", [1, 22, 29])
def test_a_task_trains_its_line_of_the_table(task: int, tmp_path: Path) -> None:
    run = RUNS[task - 1]
    done = slurm(tmp_path, task, "train.micro_batch_size=4")
    expected = f"9 1 16 node1 train configs/paper/{run['config']}.yaml model.design={run['design']} "
    expected += f"train.learning_rate={run['learning_rate']} train.micro_batch_size=4 --out runs/paper/{run['run']}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


@needs_bash
def test_only_a_run_that_was_told_to_stop_is_queued_again(tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(PAPER / "slurm.sh")]).returncode == 0
    stopped = slurm(tmp_path, 1, status=143)
    assert stopped.returncode == 143
    assert stopped.stdout.endswith("scontrol requeue 70001\n")
    failed = slurm(tmp_path, 1, status=2)
    assert failed.returncode == 2
    assert "scontrol" not in failed.stdout
    beyond = slurm(tmp_path, 30)
    assert (beyond.returncode, beyond.stderr) == (2, "configs/paper/runs.tsv has no run 30\n")
    assert f"#SBATCH --array=1-{len(RUNS)}\n" in (PAPER / "slurm.sh").read_text(encoding="utf-8")
