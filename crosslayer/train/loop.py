"""The training loop. Every process runs it; the first one reports and writes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from crosslayer import checkpoint
from crosslayer.checkpoint.state import load_state, save_state
from crosslayer.data import PreparedData, TrainBatches
from crosslayer.environment import describe_environment
from crosslayer.errors import UserError
from crosslayer.evaluate import Score, score
from crosslayer.files import read_json, write_json
from crosslayer.model import Transformer
from crosslayer.settings import to_mapping
from crosslayer.train.config import TrainConfig
from crosslayer.train.host import autocast
from crosslayer.train.metrics import MetricsWriter, ProgressLine, Unseen, clock, import_summary_writer
from crosslayer.train.parallel import whole_model
from crosslayer.train.processes import Processes, single_process
from crosslayer.train.step import TrainStep

RESULT = "result.json"


def train(
    config: TrainConfig, data: PreparedData, out: Path, *, label: str = "train", processes: Processes | None = None
) -> dict[str, Any]:
    """Train a model, going on from the newest checkpoint in `out` if there is one.

    `processes`, from `joined_processes`, call this together; without them the run has one process.

    `out` receives config.json, metrics.jsonl, checkpoints/, the finished model folder model/ and result.json, whose
    content is returned: held-out scores, parameters, tokens, seconds of training and the machine. A run that has
    finished is not repeated.

    Raises:
        UserError: `out` belongs to a run with another config or other data, the model or the data cannot be trained
            with as the config says, or the loss is no longer a number.
    """
    processes = processes or single_process(config.train)
    result = out / RESULT
    # What cannot be built is refused before the folder is claimed for it.
    run = None if processes.on_first(result.exists) else _Run(config, data, out, label, processes)
    settings = {**to_mapping(config), "data_fingerprint": data.fingerprint}
    processes.on_first(lambda: claim_folder(out, settings))
    return processes.on_first(lambda: read_json(result)) if run is None else run.finish()


def claim_folder(out: Path, settings: dict[str, Any]) -> None:
    """Record in `out/config.json` what the run is, or check that it is the one recorded there.

    Raises:
        UserError: the folder was started with other settings (the message names the first that differs), or cannot
            be written.
    """
    record = out / "config.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            write_json(record, settings)
    except OSError as error:
        raise UserError(f"output folder {out} cannot be written: {error.strerror}") from None
    now, before = _flat(json.loads(json.dumps(settings))), _flat(read_json(record))
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            raise UserError(
                f"{out} was started with {key} = {before.get(key)}, now it is {now.get(key)}; "
                "restore it to go on, or choose another output folder"
            )


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class _Run:
    def __init__(self, config: TrainConfig, data: PreparedData, out: Path, label: str, processes: Processes) -> None:
        self.recipe, self.data, self.out, self.label, self.processes = config.train, data, out, label, processes
        recipe, tokenizer = self.recipe, data.tokenizer
        model_config = config.model_config(tokenizer)
        self.device = processes.device
        self.model = Transformer(model_config, seed=recipe.seed)
        if processes.mesh is None:
            self.model.to(self.device)
        self.step = TrainStep(self.model, recipe, processes.mesh)
        self.eos_id = tokenizer.eos_id if recipe.mask_documents else None
        self.batches = TrainBatches(
            data.train,
            batch_size=recipe.batch_size,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
            eos_id=self.eos_id,
            rank=processes.data_rank,
            world_size=processes.data_size,
        )
        if recipe.tensorboard:
            import_summary_writer()

    def finish(self) -> dict[str, Any]:
        """Train from the newest checkpoint to the end, evaluate, and write the model and the result."""
        state = None
        if self.processes.mesh is None:  # TODO: checkpoints of several processes
            state = load_state(self.out / "checkpoints", self.model, self.step.optimizer)
        state = state or {"step": 0, "seconds": 0.0, "unlogged_loss": 0.0}
        steps = self.recipe.steps
        seen = self.processes.first
        with (
            closing(MetricsWriter(self.out, state["step"], self.recipe.tensorboard) if seen else Unseen()) as metrics,
            closing(ProgressLine(self.label) if seen else Unseen()) as progress,
        ):
            seconds = self._train(state, metrics, progress)
            held_out = self._score(
                None, lambda n, total: progress.show(f"held-out text {n:,}/{total:,} tokens", last=n == total)
            )
            _require_finite(held_out.loss, steps)
            self._log(metrics, steps, **_validation(held_out))
        return self._write(held_out, seconds)

    def _train(self, state: dict[str, Any], metrics: MetricsWriter | Unseen, progress: ProgressLine | Unseen) -> float:
        """All steps that `state` leaves; returns the seconds spent, those before `state` included."""
        recipe, steps, first = self.recipe, self.recipe.steps, state["step"]
        started = rated_at = time.monotonic()
        rated_step = first
        unlogged = torch.tensor(state["unlogged_loss"], device=self.device)  # summed over the steps since the last log
        for step in range(first, steps):
            unlogged += self.step(step, self.batches[step]).loss
            done = step + 1
            if done % recipe.log_every == 0 or done == steps:
                loss = unlogged.item() / (step % recipe.log_every + 1)
                now = time.monotonic()  # after .item(), which waits for the device
                _require_finite(loss, done)
                rate = (done - rated_step) * recipe.tokens_per_step / (now - rated_at)
                self._log(metrics, done, loss=loss, tokens_per_second=rate)
                left = clock((steps - done) * (now - started) / (done - first))
                progress.show(
                    f"step {done}/{steps}  loss {loss:.3f}  {rate:,.0f} tokens/s  {left} left", last=done == steps
                )
                unlogged, rated_at, rated_step = torch.zeros_like(unlogged), now, done
            paused_at = time.monotonic()
            if recipe.eval_every and done % recipe.eval_every == 0 and done < steps:
                self._log(metrics, done, **_validation(self._score(recipe.eval_tokens)))
            if (
                self.processes.mesh is None
                and recipe.checkpoint_every
                and done % recipe.checkpoint_every == 0
                and done < steps
            ):
                seconds = state["seconds"] + time.monotonic() - started
                progressed = {"seconds": seconds, "unlogged_loss": unlogged.item()}
                save_state(self.out / "checkpoints", done, self.model, self.step.optimizer, progressed)
            rated_at += time.monotonic() - paused_at  # tokens per second are those of training alone
        return float(state["seconds"] + time.monotonic() - started)

    def _score(self, max_tokens: int | None, progress: Callable[[int, int], None] | None = None) -> Score:
        with autocast(self.device, self.recipe.precision):
            return score(
                self.model,
                self.data.valid,
                sequence_length=self.recipe.sequence_length,
                batch_size=self.step.micro_batch_size,
                max_tokens=max_tokens,
                mask_documents_at=self.eos_id,
                progress=progress,
                group=self.processes.data_group,
            )

    def _log(self, metrics: MetricsWriter | Unseen, step: int, **values: float) -> None:
        metrics.write(step, tokens=step * self.recipe.tokens_per_step, **values)

    def _write(self, held_out: Score, seconds: float) -> dict[str, Any]:
        model = self.model if self.processes.mesh is None else whole_model(self.model)

        def write() -> dict[str, Any]:
            assert model is not None
            checkpoint.save(model, self.out / "model", tokenizer=self.data.tokenizer)
            result = {
                "validation": held_out.to_dict(),
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens": self.recipe.steps * self.recipe.tokens_per_step,
                "steps": self.recipe.steps,
                "seconds": seconds,
                "processes": self.processes.count,
                "environment": describe_environment(),
            }
            write_json(self.out / RESULT, result)
            return result

        return self.processes.on_first(write)


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(f"step {step}: the loss is {loss}; lower train.learning_rate or train.clip")


def _validation(held_out: Score) -> dict[str, float]:
    return {
        "validation_loss": held_out.loss,
        "validation_perplexity": held_out.perplexity,
        "validation_bits_per_byte": held_out.bits_per_byte,
    }
