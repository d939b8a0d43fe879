"""What a training run computes, and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from crosslayer import checkpoint
from crosslayer.data import Batch, PreparedData, Tokenizer, TrainBatches
from crosslayer.errors import UserError
from crosslayer.evaluate import Score, score
from crosslayer.model import transformer as transformer_module
from crosslayer.train import Recipe
from crosslayer.train import loop as loop_module
from crosslayer.train import step as step_module
from crosslayer.train.step import StepOutput, TrainStep
from tests.conftest import tiny_config
from tests.model.checks import assert_same_gradients, random_model
from tests.train.runs import config, metrics, run, same_weights, weights


def gradients_of_a_step(
    batch: Batch, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients that a training step hands to the optimizer."""
    model = random_model(tiny_config("cla2", vocab_size=300))
    seen: dict[str, Tensor] = {}

    def look(*_: object) -> None:
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(step_module, "clipped_step", look)
    loss = TrainStep(model, recipe)(0, batch).loss.item()
    assert all(parameter.grad is None for parameter in model.parameters())
    return loss, seen


@pytest.mark.parametrize("mask_documents", [False, True])
def test_gradients_accumulate_to_those_of_the_whole_batch(
    mask_documents: bool, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos_id = data.tokenizer.eos_id if mask_documents else None
    batch = TrainBatches(data.train, batch_size=6, sequence_length=16, seed=0, eos_id=eos_id)[0]
    whole_loss, whole = gradients_of_a_step(batch, config(batch_size=6).train, monkeypatch)
    assert whole.keys() == dict(random_model(tiny_config("cla2", vocab_size=300)).named_parameters()).keys()
    for size in (1, 2, 3):
        recipe = config(batch_size=6, micro_batch_size=size).train
        loss, gradients = gradients_of_a_step(batch, recipe, monkeypatch)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        assert_same_gradients(gradients, whole, f"micro_batch_size {size}")


def test_masked_documents_are_trained_as_if_they_were_apart(data: PreparedData) -> None:
    model = random_model(tiny_config("cla2", vocab_size=300))
    settings = {"batch_size": 3, "sequence_length": 48, "seed": 0}
    masked = TrainBatches(data.train, **settings, eos_id=data.tokenizer.eos_id)[0]
    open_batch = TrainBatches(data.train, **settings)[0]
    assert masked.document_ids is not None
    total = 0.0
    for inputs, targets, ids in zip(masked.inputs, masked.targets, masked.document_ids, strict=True):
        assert len(np.unique(ids)) > 1
        for document in np.unique(ids):
            mine = torch.from_numpy(ids == document)
            logits = model(torch.from_numpy(inputs)[mine][None])[0]
            total += cross_entropy(logits, torch.from_numpy(targets)[mine], reduction="sum").item()
    step = TrainStep(model, config(batch_size=3, sequence_length=48, learning_rate=1e-9).train)
    loss = step(0, masked).loss.item()
    assert loss == pytest.approx(total / (3 * 48), rel=1e-5)
    assert abs(step(0, open_batch).loss.item() - loss) > 0.01


def test_it_learns(data: PreparedData, tmp_path: Path) -> None:
    result = run(data, tmp_path, steps=60, learning_rate=2e-2, model={"tie_word_embeddings": True})
    losses = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert losses[0] > 0.8 * math.log(data.tokenizer.vocab_size)
    assert losses[-1] < 0.4 * losses[0]
    assert result["validation"]["loss"] < 0.5 * losses[0]  # on sentences it has not seen, of the same kind


def test_what_a_run_leaves(data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "run"
    per_step = record_losses(pytest.MonkeyPatch())
    with per_step as losses:
        result = run(data, out, steps=10, eval_every=3, eval_tokens=40)
    files = {".lock", "config.json", "tokenizer", "checkpoints", "metrics.jsonl", "model", "result.json"}
    assert {path.name for path in out.iterdir()} == files
    lines = metrics(out)
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 10, 10]
    assert all(line["tokens"] == line["step"] * 64 for line in lines)
    # Training: the mean over the steps since the last line.
    trained = [line["loss"] for line in lines if "loss" in line]
    assert trained == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:8]), np.mean(losses[8:])], rel=1e-6)
    # Held-out text: part of it on the way, all of it at the end.
    keys = {"step", "tokens", "validation_loss", "validation_perplexity", "validation_bits_per_byte"}
    assert [line.keys() for line in lines if "loss" not in line] == [keys] * 4
    assert result["validation"]["tokens"] == len(data.valid) - 1
    last = lines[-1]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert last[f"validation_{name}"] == result["validation"][name]
    # The model folder holds the model that was scored, and its tokenizer.
    model = checkpoint.load(out / "model")
    assert model.config.plan.key_sources == (0, 0, 2, 2)
    assert score(model, data.valid, sequence_length=16).loss == pytest.approx(result["validation"]["loss"], rel=1e-6)
    assert Tokenizer.load(out / "model").files() == data.tokenizer.files()
    # The result, returned and on the disk.
    assert json.loads((out / "result.json").read_text()) == result
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (result["steps"], result["tokens"]) == (10, 640)
    assert result["seconds"] > 0
    assert result["environment"]["torch"] == torch.__version__
    # The progress line.
    printed = capsys.readouterr().err
    assert "step 10/10  loss" in printed
    assert "tokens/s" in printed


def record_losses(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which the losses that training steps return are collected."""
    losses: list[float] = []
    plain = TrainStep.__call__

    def recording(self: TrainStep, step: int, batch: Batch) -> StepOutput:
        output = plain(self, step, batch)
        losses.append(output.loss.item())
        return output

    class Recorder:
        def __enter__(self) -> list[float]:
            monkeypatch.setattr(TrainStep, "__call__", recording)
            return losses

        def __exit__(self, *_: object) -> None:
            monkeypatch.undo()

    return Recorder()


def test_a_finished_run_is_not_repeated(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(data, tmp_path)
    monkeypatch.setattr(loop_module, "Transformer", None)  # anything built now would fail
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(data, tmp_path) == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_seed_decides(data: PreparedData, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(data, tmp_path / name, seed=seed)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    other = weights(tmp_path / "c")
    assert all(
        not torch.equal(weight, other[name]) for name, weight in weights(tmp_path / "a").items() if weight.ndim > 1
    )
    assert metrics(tmp_path / "a")[0] != metrics(tmp_path / "c")[0]


@pytest.mark.parametrize(("recompute", "calls"), [("block", 4), ("group", 2)])  # of four layers in two groups
def test_activation_checkpointing_changes_nothing(
    recompute: str, calls: int, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data, tmp_path / "plain")
    checkpoints = 0
    plain = transformer_module.checkpoint

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal checkpoints
        checkpoints += 1
        return plain(*arguments, **options)

    monkeypatch.setattr(transformer_module, "checkpoint", counting)
    run(data, tmp_path / "checkpointed", activation_checkpointing=recompute)
    assert checkpoints == 10 * calls  # ten steps
    assert same_weights(tmp_path / "plain", tmp_path / "checkpointed")


def test_bfloat16_is_close_and_keeps_float32_weights(data: PreparedData, tmp_path: Path) -> None:
    exact = run(data, tmp_path / "fp32")["validation"]["loss"]
    rounded = run(data, tmp_path / "bf16", precision="bf16")["validation"]["loss"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert {weight.dtype for weight in weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_training_is_close_to_eager(data: PreparedData, tmp_path: Path) -> None:
    eager = run(data, tmp_path / "eager")["validation"]["loss"]
    compiled = run(data, tmp_path / "compiled", compile=True)["validation"]["loss"]
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_tensorboard(data: PreparedData, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(data, tmp_path, steps=8, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = [(line["step"], line["loss"]) for line in metrics(tmp_path) if "loss" in line]
    assert [event.step for event in events.Scalars("loss")] == [step for step, _ in expected]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([loss for _, loss in expected])
    assert "validation_bits_per_byte" in events.Tags()["scalars"]


def test_tensorboard_that_is_not_installed(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"TensorBoard is not installed: pip install 'crosslayer\[tensorboard\]'"):
        run(data, tmp_path / "out", tensorboard=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"vocab_size": 280}}, "model.vocab_size 280 is less than the tokenizer's"),
        ({"sequence_length": 10_000, "batch_size": 1}, "fewer than one window"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"model": {"design": "1@4,1,2,3"}}, "reads a layer above it, and cannot have a window"),
    ],
)
def test_what_cannot_be_trained_does_not_claim_the_folder(
    settings: dict[str, Any], message: str, data: PreparedData, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(data, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_place_for_the_model_that_is_taken_is_refused_before_any_work(data: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "views.py").touch()
    with pytest.raises(UserError, match=r"model: exists and is not a folder with a config\.json"):
        run(data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_larger_vocabulary_is_allowed(data: PreparedData, tmp_path: Path) -> None:
    run(data, tmp_path, steps=2, model={"vocab_size": 512})
    assert weights(tmp_path)["lm_head.weight"].shape == (512, 32)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number(
    loss: float, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(self: TrainStep, step: int, batch: Batch) -> StepOutput:
        return StepOutput(torch.tensor(loss if step == 5 else 1.0), torch.tensor(1.0))

    monkeypatch.setattr(TrainStep, "__call__", diverging)
    with pytest.raises(UserError, match=rf"step 8: the loss is {loss}; lower train.learning_rate or train.clip"):
        run(data, tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_loss_that_is_no_number_leaves_no_checkpoint(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainStep.__call__

    def diverging(self: TrainStep, step: int, batch: Batch) -> StepOutput:
        output = plain(self, step, batch)
        return output._replace(loss=torch.tensor(math.nan)) if step == 4 else output

    monkeypatch.setattr(TrainStep, "__call__", diverging)
    with pytest.raises(UserError, match="step 6: the loss is nan; lower"):
        run(data, tmp_path, log_every=100, checkpoint_every=3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_ten_skipped_steps_end_the_run_however_seldom_it_reports(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainStep._loss
    monkeypatch.setattr(TrainStep, "_loss", lambda *arguments: plain(*arguments) * math.inf)
    with pytest.raises(UserError, match="step 10: no finite gradients in the last 10 steps"):
        run(data, tmp_path, steps=40, log_every=100)


@pytest.mark.parametrize(("steps", "log_every"), [(40, 4), (40, 1), (5, 4)])
def test_steps_that_are_all_skipped(
    steps: int, log_every: int, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose every batch breaks it stops; one that is broken by some goes on (tests/train/test_resume.py)."""
    plain = TrainStep._loss
    monkeypatch.setattr(TrainStep, "_loss", lambda *arguments: plain(*arguments) * math.inf)
    with pytest.raises(UserError, match=r"step \d+: no finite gradients in the last \d+ steps, all of them skipped"):
        run(data, tmp_path, steps=steps, log_every=log_every)
    assert not (tmp_path / "model").exists()


def test_a_held_out_loss_that_is_no_number(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "score", lambda *_, **__: Score(math.nan, 1, 1))
    with pytest.raises(UserError, match="step 10: the loss is nan"):
        run(data, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_an_output_folder_that_cannot_be(data: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"output folder .*file.* cannot be written"):
            run(data, out)


class Terminal:
    """A stream that says it is a terminal, or that it is not."""

    def __init__(self, live: bool) -> None:
        self.live, self.text = live, ""

    def isatty(self) -> bool:
        return self.live

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_progress_that_nobody_can_read_ends_no_run(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w", buffering=1) as log:  # noqa: PTH123 (line by line, as stderr is)
        monkeypatch.setattr(sys, "stderr", log)
        assert run(data, tmp_path)["steps"] == 10
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())  # or closing it would fail


def test_progress_line() -> None:
    from crosslayer.train.metrics import ProgressLine, clock

    live: Any = Terminal(True)
    line = ProgressLine("train", live)
    line.show("a long text")
    line.show("short")
    line.close()
    assert live.text == "\rtrain  a long text\rtrain  short      \n"

    file: Any = Terminal(False)
    line = ProgressLine("train", file)
    for number in range(5):
        line.show(str(number), last=number == 4)
    line.close()
    assert file.text == "train  0\ntrain  4\n"  # those between came too soon after the first

    assert [clock(seconds) for seconds in (0.4, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]
