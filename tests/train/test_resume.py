"""A run that was stopped and started again ends where it would have ended: the same weights, the same metrics."""

from __future__ import annotations

import errno
import fcntl
import math
import shutil
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from crosslayer.checkpoint.state import Checkpoints
from crosslayer.data import Batch, PreparedData, TrainBatches
from crosslayer.errors import Stopped, UserError
from crosslayer.train import Recipe
from crosslayer.train import loop as loop_module
from crosslayer.train.config import MAY_CHANGE
from crosslayer.train.step import StepOutput, TrainStep
from tests.train.runs import metrics, prepare_corpus, run, same_weights

# Checkpoints after steps 3, 6, 9, 10; lines of metrics after 4, 8, 10; evaluations after 5.
SETTINGS: dict[str, Any] = {"checkpoint_every": 3, "eval_every": 5, "eval_tokens": 30}


class Killed(Exception):
    """The process ends here."""


@pytest.fixture(scope="session")
def whole(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has stopped."""
    out = tmp_path_factory.mktemp("whole")
    run(data, out, **SETTINGS)
    return out


def stop(data: PreparedData, out: Path, step: int) -> None:
    """Run, and be killed in the step with this number (from 0)."""
    plain = TrainStep.__call__

    def killed(self: TrainStep, number: int, batch: Batch) -> StepOutput:
        if number == step:
            raise Killed
        return plain(self, number, batch)

    kill(data, out, TrainStep, "__call__", killed)


def kill(data: PreparedData, out: Path, place: Any, name: str, replacement: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, replacement)
        with pytest.raises(Killed):
            run(data, out, **SETTINGS)
    assert not (out / "result.json").exists()


def assert_resumes(data: PreparedData, out: Path, whole: Path) -> None:
    result = run(data, out, **SETTINGS)
    assert same_weights(out, whole)
    assert metrics(out) == metrics(whole)
    assert result["validation"]["loss"] == metrics(whole)[-1]["validation_loss"]


@pytest.mark.parametrize("step", range(10))
def test_stopped_at_any_step(step: int, data: PreparedData, whole: Path, tmp_path: Path) -> None:
    stop(data, tmp_path, step)
    steps_run: list[int] = []
    plain = TrainStep.__call__

    def counting(self: TrainStep, number: int, batch: Batch) -> StepOutput:
        steps_run.append(number)
        return plain(self, number, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", counting)
        assert_resumes(data, tmp_path, whole)
    assert steps_run == list(range(step - step % 3, 10))  # from the newest checkpoint on


def test_stopped_again_and_again(data: PreparedData, whole: Path, tmp_path: Path) -> None:
    for step in (2, 4, 5, 8, 9):
        stop(data, tmp_path, step)
    assert_resumes(data, tmp_path, whole)


def raise_killed(*_: object, **__: object) -> None:
    raise Killed


def test_killed_between_metrics_and_checkpoint(data: PreparedData, whole: Path, tmp_path: Path) -> None:
    plain = Checkpoints.save

    def save(self: Checkpoints, step: int, *arguments: Any) -> None:
        if step == 6:  # metrics have lines of steps 4 and 5 by now
            raise Killed
        plain(self, step, *arguments)

    kill(data, tmp_path, Checkpoints, "save", save)
    assert [line["step"] for line in metrics(tmp_path)] == [4, 5]
    assert_resumes(data, tmp_path, whole)


def test_killed_while_writing_a_line_of_metrics(data: PreparedData, whole: Path, tmp_path: Path) -> None:
    stop(data, tmp_path, 8)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "tok')
    assert_resumes(data, tmp_path, whole)


@pytest.mark.parametrize("name", ["write_json", "checkpoint.save"])
def test_killed_while_finishing(name: str, data: PreparedData, whole: Path, tmp_path: Path) -> None:
    if name == "write_json":
        stop(data, tmp_path, 5)
        kill(data, tmp_path, loop_module, "write_json", raise_killed)
        assert (tmp_path / "model").exists()
    else:
        kill(data, tmp_path, loop_module.checkpoint, "save", raise_killed)
    assert_resumes(data, tmp_path, whole)


@pytest.mark.parametrize("damage", ["weights", "state", "checksums", "cut short"])
def test_a_damaged_checkpoint_is_passed_over(damage: str, data: PreparedData, whole: Path, tmp_path: Path) -> None:
    stop(data, tmp_path, 8)
    newest = tmp_path / "checkpoints" / "step-00000006"
    weights = newest / "rank-00000.safetensors"
    if damage == "weights":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
    elif damage == "state":
        (newest / "state.json").unlink()
    elif damage == "checksums":
        (newest / "checksums.json").unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"skipping a damaged checkpoint: .*step-00000006"):
        assert_resumes(data, tmp_path, whole)
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-00000009", "step-00000010"]


def test_no_checkpoint_that_is_whole(data: PreparedData, whole: Path, tmp_path: Path) -> None:
    """Nothing is overwritten that could still be mended."""
    stop(data, tmp_path, 8)
    folder, apart = tmp_path / "checkpoints", tmp_path / "apart"
    apart.mkdir()
    names = sorted(checkpoint.name for checkpoint in folder.iterdir())
    for name in names:
        (folder / name / "rank-00000.safetensors").rename(apart / name)
    lines = metrics(tmp_path)
    with (
        pytest.warns(UserWarning, match="skipping a damaged checkpoint") as warned,
        pytest.raises(UserError, match=rf"{folder}: no whole checkpoint in it; remove it to start from the beginning"),
    ):
        run(data, tmp_path, **SETTINGS)
    assert len(warned) == len(names) == 2
    assert metrics(tmp_path) == lines
    for name in names:
        (apart / name).rename(folder / name / "rank-00000.safetensors")
    assert_resumes(data, tmp_path, whole)


def test_checkpoints_of_another_run(data: PreparedData, whole: Path, tmp_path: Path) -> None:
    """Of the same shape, and with other weights."""
    stop(data, tmp_path / "mine", 8)
    run(data, tmp_path / "other", **SETTINGS, seed=1)
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "mine" / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"checkpoints: the checkpoint of step 10 is that of another run"):
        run(data, tmp_path / "mine", **SETTINGS)
    for step in (9, 10):
        shutil.rmtree(tmp_path / "mine" / "checkpoints" / f"step-{step:08d}")
    assert_resumes(data, tmp_path / "mine", whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 2e-2}, r"was started with train\.learning_rate = 0\.01, now it is 0\.02; restore it"),
        ({"model": {"design": "MQA-CLA4"}}, r"was started with model\.design = MQA-CLA2, now it is MQA-CLA4"),
        ({"model": {"qk_norm": True}}, r"was started with model\.qk_norm = None, now it is True"),
        ({"steps": 11}, r"was started with train\.tokens = 640, now it is 704"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_another_config_is_refused(
    finished: bool, changed: dict[str, Any], message: str, data: PreparedData, whole: Path, tmp_path: Path
) -> None:
    if not finished:
        stop(data, tmp_path, 4)
    out = whole if finished else tmp_path
    with pytest.raises(UserError, match=message):
        run(data, out, **{**SETTINGS, **changed})


def test_other_data_is_refused(whole: Path, tmp_path: Path) -> None:
    other = prepare_corpus(tmp_path, documents=119)
    with pytest.raises(UserError, match="was started with other data: the text, or the tokenizer, is not what it was"):
        run(other, whole, **SETTINGS)


def test_the_same_data_in_another_place_goes_on(data: PreparedData, whole: Path, tmp_path: Path) -> None:
    stop(data, tmp_path / "run", 8)
    (tmp_path / "elsewhere").mkdir()
    assert_resumes(prepare_corpus(tmp_path / "elsewhere"), tmp_path / "run", whole)

    def claim(paths: list[str], fingerprint: str) -> None:
        loop_module.claim_folder(tmp_path, {"data": {"paths": paths}, "data_fingerprint": fingerprint})

    claim(["a.txt"], "1")
    claim(["moved/a.txt"], "1")
    with pytest.raises(UserError, match="was started with other data"):
        claim(["a.txt"], "2")


# -- one process at a time ----------------------------------------------------------------------------------------


def test_another_process_in_the_folder_is_refused(data: PreparedData, whole: Path, tmp_path: Path) -> None:
    stop(data, tmp_path, 8)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with (tmp_path / ".lock").open() as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"another process is training in {tmp_path}"):
            run(data, tmp_path, **SETTINGS)
    del before[tmp_path / ".lock"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_resumes(data, tmp_path, whole)


def test_a_run_keeps_others_out_and_lets_them_in_at_its_end(data: PreparedData, tmp_path: Path) -> None:
    refused: list[str] = []
    plain = TrainStep.__call__

    def second(self: TrainStep, number: int, batch: Batch) -> StepOutput:
        if number == 4:
            with pytest.raises(UserError) as error:
                run(data, tmp_path, **SETTINGS)
            refused.append(str(error.value))
            raise Killed
        return plain(self, number, batch)

    kill(data, tmp_path, TrainStep, "__call__", second)
    assert refused == [f"another process is training in {tmp_path}"]
    assert run(data, tmp_path, **SETTINGS)["steps"] == 10


def test_a_file_system_without_locks(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run(data, tmp_path, steps=1)["steps"] == 1


# -- what may change ----------------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "micro_batch_size": 2,
    "tensor_parallel": 1,  # tests/train/test_parallel.py changes it
    "device": "cpu:0",
    "compile": False,
    "activation_checkpointing": "group",
    "eval_every": 4,
    "eval_tokens": 20,
    "checkpoint_every": 2,
    "log_every": 3,
    "tensorboard": True,
    "wandb": None,  # tests/train/test_metrics.py runs it
}


def test_each_of_them_is_a_setting_and_tried_here() -> None:
    places = {"data.paths", "data.valid_paths", "data.tokenizer"}
    assert {f"train.{name}" for name in CHANGES} == MAY_CHANGE - places
    assert CHANGES.keys() <= {field.name for field in fields(Recipe)}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_change_the_weights_may_change(
    name: str, data: PreparedData, whole: Path, tmp_path: Path
) -> None:
    stop(data, tmp_path, 8)
    result = run(data, tmp_path, **{**SETTINGS, name: CHANGES[name]})
    if name == "micro_batch_size":  # sums are rounded in another order
        assert result["validation"]["loss"] == pytest.approx(metrics(whole)[-1]["validation_loss"], rel=1e-5)
    else:
        assert same_weights(tmp_path, whole)
    losses = {line["step"]: line["loss"] for line in metrics(tmp_path) if "loss" in line}
    assert losses.keys() == ({4, 9, 10} if name == "log_every" else {4, 8, 10})
    if name == "log_every":  # each line is the mean since the line before, wherever that was
        of_whole = {line["step"]: line["loss"] for line in metrics(whole) if "loss" in line}
        assert 5 * losses[9] + losses[10] == pytest.approx(4 * of_whole[8] + 2 * of_whole[10], rel=1e-6)


# -- SIGTERM ------------------------------------------------------------------------------------------------------


def stop_by_sigterm(data: PreparedData, out: Path, step: int, **settings: Any) -> Stopped:
    """Run, and get SIGTERM in the middle of the step with this number."""
    plain = TrainStep.__call__

    def asked(self: TrainStep, number: int, batch: Batch) -> StepOutput:
        if number == step:
            signal.raise_signal(signal.SIGTERM)
        return plain(self, number, batch)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", asked)
        with pytest.raises(Stopped) as stopped:
            run(data, out, **{**SETTINGS, **settings})
    assert signal.getsignal(signal.SIGTERM) == before
    return stopped.value


@pytest.mark.parametrize("step", range(10))
@pytest.mark.parametrize("checkpoint_every", [0, 3])
def test_sigterm_ends_the_step_and_keeps_it(
    checkpoint_every: int, step: int, data: PreparedData, whole: Path, tmp_path: Path
) -> None:
    stopped = stop_by_sigterm(data, tmp_path, step, checkpoint_every=checkpoint_every)
    done = step + 1
    assert str(stopped) == f"stopped by SIGTERM at step {done} of 10; the same command goes on from step {done}"
    assert not (tmp_path / "result.json").exists()
    assert_resumes(data, tmp_path, whole)


def test_sigterm_after_the_last_step_takes_its_usual_effect(
    data: PreparedData, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it comes while the last checkpoint is being written, which is finished first."""
    plain = Checkpoints.wait

    def asked(self: Checkpoints) -> None:
        plain(self)
        if self.steps()[-1:] == [10]:
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, raise_killed)
    try:
        kill(data, tmp_path, Checkpoints, "wait", asked)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "checkpoints" / "step-00000010").exists()
    assert not (tmp_path / "model").exists()
    assert_resumes(data, tmp_path, whole)


# -- steps that are skipped, across a stop ------------------------------------------------------------------------


def test_skipped_steps_are_counted_once(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two batches have a loss that is no number: their steps change no weights, and count after a resume too."""
    plain = TrainStep._loss

    def broken(self: TrainStep, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        loss = plain(self, inputs, targets, document_ids)
        return loss * math.nan if (inputs.numpy() == broken_inputs).all(axis=(1, 2)).any() else loss

    batches = TrainBatches(data.train, batch_size=4, sequence_length=16, seed=0)
    broken_inputs = np.stack([batches[3].inputs, batches[5].inputs])
    monkeypatch.setattr(TrainStep, "_loss", broken)
    result = run(data, tmp_path / "whole", **SETTINGS)
    lines = [line for line in metrics(tmp_path / "whole") if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [1, 2, 2]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert (result["skipped_steps"], result["spikes"], result["failed_checkpoints"]) == (2, 0, 0)
    assert "skipped steps 2" in capsys.readouterr().err
    for step in (5, 8):
        stop(data, tmp_path / "stopped", step)
    assert run(data, tmp_path / "stopped", **SETTINGS)["skipped_steps"] == 2
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert same_weights(tmp_path / "stopped", tmp_path / "whole")
