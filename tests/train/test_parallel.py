"""Several processes compute what one does: losses, norms, the gradient of every parameter, and the trained weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosslayer import checkpoint
from crosslayer.data import PreparedData
from crosslayer.errors import UserError
from crosslayer.train import Recipe, joined_processes
from tests.train.runs import metrics, run, weights
from tests.train.spread import (
    Case,
    Trace,
    fail_on_first,
    in_processes,
    trace,
    write_run,
    write_stopped_run,
    write_trace,
)

REPOSITORY = Path(__file__).parents[2]

MQA = {"num_key_value_heads": 1}
EXTRAS = {"qk_norm": True, "attention_bias": True, "attention_output_bias": True}
TIED = {"tie_word_embeddings": True}

# By number of processes. Keys and values from different layers, windows, one and several KV heads, and each way to
# recompute activations, with and without gradient accumulation.
CASES = {
    2: [
        Case("cla2", 1, TIED, {"micro_batch_size": 2}),
        Case("fusedkv-lite", 1, EXTRAS, {"activation_checkpointing": "block", "micro_batch_size": 1}),
        Case("yoco:window=5", 1, {}, {"activation_checkpointing": "group"}),
        Case("sandwich-middle:3", 1, {}, {"activation_checkpointing": "group", "micro_batch_size": 2}),
        Case("cla2", 2, {**TIED, **EXTRAS}, {"activation_checkpointing": "group"}),
        Case("lckv:1", 2, MQA, {"micro_batch_size": 4}),
        Case("fusedkv-lite", 2, {**MQA, "qk_norm": True}, {"compile": True, "micro_batch_size": 4}),
    ],
    4: [
        Case("cla3", 1, EXTRAS, {"activation_checkpointing": "block", "micro_batch_size": 1}),
        Case("0,1,1,1,4,1/0,1,0,3,3,0", 1, TIED, {"activation_checkpointing": "group"}, documents=True),
        Case("cla2", 4, {**MQA, **TIED}, {"micro_batch_size": 4}),
        Case("fusedkv-lite", 4, EXTRAS, {"activation_checkpointing": "group"}),  # a KV head for two ranks
        Case("fusedkv-lite", 2, EXTRAS, {"activation_checkpointing": "group", "micro_batch_size": 2}),
        Case("cla2", 2, {**MQA, **TIED}, {"activation_checkpointing": "block"}, documents=True),
        Case("cla3", 2, {"intermediate_size": 54, "separate_kv_norm": False}),  # parts that do not divide evenly
    ],
}
# Whole runs: evaluations on the way, held-out batches that the data ranks do not share evenly, packed documents.
RUN: dict[str, Any] = {"steps": 6, "log_every": 1, "eval_every": 2, "eval_tokens": 80, "mask_documents": True}
RUNS: dict[int, dict[str, Any]] = {
    2: {"micro_batch_size": 1, "model": {"tie_word_embeddings": True}},
    4: {"tensor_parallel": 2, "model": {"vocab_size": 320}},
}
STOPPED_IN = 2


@pytest.fixture(scope="module")
def left_by(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder in which so many processes have left the traces of their cases, a run, and their errors."""

    @cache
    def start(count: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{count}-processes")
        calls: list[Callable[[], None]] = [
            partial(write_trace, case, folder / f"{number}.pt") for number, case in enumerate(CASES[count])
        ]
        calls.append(partial(write_run, data.folder, folder / "run", RUN | RUNS[count]))
        calls.append(partial(write_run, data.folder, folder / "bf16", RUN | RUNS[count] | {"precision": "bf16"}))
        calls.append(partial(write_stopped_run, data.folder, folder / "stopped", RUN | RUNS[count], STOPPED_IN))
        calls.append(partial(fail_on_first, folder / "error"))
        in_processes(count, calls)
        return folder

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "number"),
    [pytest.param(count, n, id=f"{count} {case.name}") for count in CASES for n, case in enumerate(CASES[count])],
)
def test_steps_are_those_of_one_process(count: int, number: int, left_by: Callable[[int], Path]) -> None:
    found: Trace = torch.load(left_by(count) / f"{number}.pt", weights_only=False)
    case = CASES[count][number]
    expected = trace(replace(case, recipe=case.recipe | {"compile": False}))
    assert expected is not None
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)  # they are summed in float32
    assert found.norms == pytest.approx(expected.norms, rel=1e-6)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert error(found.gradients[name], gradient) < 1e-11, name
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert error(found.weights[name], weight) < 1e-6, name


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("count", RUNS)
def test_a_run_leaves_what_one_process_leaves(
    count: int, left_by: Callable[[int], Path], data: PreparedData, tmp_path: Path
) -> None:
    out = left_by(count) / "run"
    expected = run(data, tmp_path, **RUN | RUNS[count] | {"tensor_parallel": 1})
    result = json.loads((out / "result.json").read_text())
    assert (result["processes"], expected["processes"]) == (count, 1)
    assert result["validation"] == pytest.approx(expected["validation"], rel=1e-6)
    assert result["parameters"] == expected["parameters"]
    assert [line.keys() for line in metrics(out)] == [line.keys() for line in metrics(tmp_path)]
    for found, wanted in zip(metrics(out), metrics(tmp_path), strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)
    assert checkpoint.load(out / "model").config == checkpoint.load(tmp_path / "model").config
    for name, weight in weights(tmp_path).items():
        # AdamW divides by the size of a gradient, and so makes much of the rounding of a small one.
        assert error(weights(out)[name], weight) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("count", RUNS)
def test_one_process_goes_on_where_several_were_stopped(
    count: int, left_by: Callable[[int], Path], data: PreparedData, tmp_path: Path
) -> None:
    """SIGTERM reached one of them only; all stopped at the step after, with one checkpoint."""
    out = tmp_path / "out"
    shutil.copytree(left_by(count) / "stopped", out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{STOPPED_IN + 2:08d}"]
    assert [line["step"] for line in metrics(out) if "loss" in line] == list(range(1, STOPPED_IN + 3))
    settings = RUN | RUNS[count] | {"tensor_parallel": 1}
    result, expected = run(data, out, **settings), run(data, tmp_path / "whole", **settings)
    assert result["validation"] == pytest.approx(expected["validation"], rel=1e-6)
    for found, wanted in zip(metrics(out), metrics(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("count", RUNS)
def test_bfloat16_is_close_and_keeps_float32_weights(count: int, left_by: Callable[[int], Path]) -> None:
    exact, rounded = (
        [line["loss"] for line in metrics(left_by(count) / name) if "loss" in line] for name in ("run", "bf16")
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)
    assert {weight.dtype for weight in weights(left_by(count) / "bf16").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("count", RUNS)
def test_a_mistake_that_the_first_process_meets_ends_all(count: int, left_by: Callable[[int], Path]) -> None:
    told = [file.read_text() for file in left_by(count).glob("error-*")]
    assert told == ["no such corpus"] * count


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["crosslayer", "train", "configs/tiny.yaml", "--out", str(tmp_path / "out"), "train.device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CROSSLAYER_CACHE": str(tmp_path / "cache")}

    def start(*settings: str) -> subprocess.CompletedProcess[str]:
        everything = [*command, *settings]
        return subprocess.run(everything, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)

    settings = ["train.tokens=8192", "train.sequence_length=64", "train.checkpoint_every=0", "data.max_bytes=300_000"]
    done = start(*settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1  # one process reports
    assert done.stderr.count("step 16/16") == 1
    assert checkpoint.load(tmp_path / "out" / "model").config.plan.key_sources == (0, 0, 2, 2, 4, 4)
    refused = start(*settings, "train.tensor_parallel=3")
    assert refused.returncode != 0
    assert "train.tensor_parallel 3 must divide the number of processes, 2" in refused.stderr


def test_tensor_parallel_needs_processes(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with (
        pytest.raises(
            UserError, match=r"tensor_parallel 2 must divide the number of processes, 1; torchrun --nproc-per"
        ),
        joined_processes(Recipe(tensor_parallel=2)),
    ):
        pass


def test_processes_that_nobody_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UserError, match=r"^WORLD_SIZE=4 without MASTER_ADDR, MASTER_PORT: start them with torchrun"),
        joined_processes(Recipe(device="cpu")),
    ):
        pass


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"batch_size": 6}, "train.batch_size 6 must be a multiple of the data ranks, 4"),
        ({"batch_size": 24, "micro_batch_size": 4}, "micro_batch_size 4 must divide the 6 sequences of a data rank"),
    ],
)
def test_a_batch_that_cannot_be_divided(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**recipe).micro_batch_of(4)


def test_micro_batches_of_a_part() -> None:
    recipe = Recipe(batch_size=24, micro_batch_size=4)
    assert [recipe.micro_batch_of(ranks) for ranks in (1, 2, 3, 6, 12, 24)] == [4, 4, 4, 4, 2, 1]
