"""A run that was stopped and started again ends where it would have ended: the same weights, the same metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crosslayer.checkpoint.state import Checkpoints
from crosslayer.data import Batch, PreparedData
from crosslayer.errors import UserError
from crosslayer.train import loop as loop_module
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
    stop(data, tmp_path, 8)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        (checkpoint / "rank-00000.safetensors").unlink()
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint") as warned:
        assert_resumes(data, tmp_path, whole)
    assert len(warned) == 2


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
    with pytest.raises(UserError, match="was started with data_fingerprint = "):
        run(other, whole, **SETTINGS)
