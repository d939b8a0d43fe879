"""The training loop, on one device."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crosslayer import checkpoint
from crosslayer.checkpoint.files import read_json, write_json
from crosslayer.checkpoint.state import load_state, save_state
from crosslayer.data import Batch, PreparedData, TrainBatches
from crosslayer.environment import describe_environment
from crosslayer.errors import UserError
from crosslayer.evaluate import Score, score
from crosslayer.model import Transformer
from crosslayer.model.loss import linear_cross_entropy
from crosslayer.settings import to_mapping
from crosslayer.train.config import Recipe, TrainConfig, make_model_config
from crosslayer.train.host import autocast, choose_device
from crosslayer.train.metrics import MetricsWriter, ProgressLine
from crosslayer.train.optimizer import learning_rate_at, make_optimizer

RESULT = "result.json"


def train(config: TrainConfig, data: PreparedData, out: Path, *, label: str = "train") -> dict[str, Any]:
    """Train a model, going on from the newest checkpoint in `out` if there is one.

    `out` receives config.json, metrics.jsonl, checkpoints/, the finished model folder model/ and result.json, whose
    content is returned: held-out scores, parameters, tokens, seconds of training and the machine. A run that has
    finished is not repeated.

    Raises:
        UserError: `out` belongs to a run with another config or other data, or the loss is no longer a number.
    """
    claim_folder(out, {**to_mapping(config), "data_fingerprint": data.fingerprint})
    if (out / RESULT).exists():
        return read_json(out / RESULT)
    return _Run(config, data, out, label).finish()


def claim_folder(out: Path, settings: dict[str, Any]) -> None:
    """Record in `out/config.json` what the run is, or check that it is the one recorded there.

    Raises:
        UserError: the folder was started with other settings; the message names the first that differs.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = out / "config.json"
    if not record.exists():
        write_json(record, settings)
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


@dataclass
class _Run:
    config: TrainConfig
    data: PreparedData
    out: Path
    label: str

    def __post_init__(self) -> None:
        self.recipe: Recipe = self.config.train
        tokenizer = self.data.tokenizer
        self.device = choose_device(self.recipe.device)
        model_config = make_model_config(
            self.config.model,
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_id,
            context=self.recipe.sequence_length,
        )
        self.model = Transformer(model_config, seed=self.recipe.seed).to(self.device)
        self.model.model.activation_checkpointing = self.recipe.activation_checkpointing
        self.optimizer = make_optimizer(
            self.model,
            learning_rate=self.recipe.learning_rate,
            betas=(self.recipe.betas[0], self.recipe.betas[1]),
            weight_decay=self.recipe.weight_decay,
        )
        self.eos_id = tokenizer.eos_id if self.recipe.mask_documents else None
        self.batches = TrainBatches(
            self.data.train,
            batch_size=self.recipe.batch_size,
            sequence_length=self.recipe.sequence_length,
            seed=self.recipe.seed,
            eos_id=self.eos_id,
        )
        self.decoder = torch.compile(self.model.model) if self.recipe.compile else self.model.model

    def finish(self) -> dict[str, Any]:
        """Train from the newest checkpoint to the end, evaluate, and write the model and the result."""
        recipe, steps = self.recipe, self.recipe.steps
        state = load_state(self.out / "checkpoints", self.model, self.optimizer) or {"step": 0, "seconds": 0.0}
        first, seconds_before = int(state["step"]), float(state["seconds"])
        metrics = MetricsWriter(self.out, first, recipe.tensorboard)
        progress = ProgressLine(self.label, steps)
        started = time.monotonic()
        since_log, logged_at, logged_step = torch.zeros((), device=self.device), started, first
        for step in range(first, steps):
            since_log += self._step(step)
            done = step + 1
            if done % recipe.log_every == 0 or done == steps:
                now = time.monotonic()
                count = done - logged_step
                loss = since_log.item() / count
                if not math.isfinite(loss):
                    raise UserError(f"step {done}: the loss is {loss}; lower train.learning_rate or train.clip")
                rate = count * recipe.tokens_per_step / (now - logged_at)
                self._log(metrics, done, loss=loss, tokens_per_second=rate)
                left = (steps - done) * (now - started) / (done - first)
                progress.show(done, loss=loss, tokens_per_second=rate, seconds_left=left)
                since_log, logged_at, logged_step = torch.zeros_like(since_log), now, done
            if recipe.eval_every and done % recipe.eval_every == 0 and done < steps:
                self._log(metrics, done, **_validation(self._score(recipe.eval_tokens)))
            if recipe.checkpoint_every and done % recipe.checkpoint_every == 0 and done < steps:
                seconds = seconds_before + time.monotonic() - started
                save_state(self.out / "checkpoints", done, self.model, self.optimizer, {"seconds": seconds})
        progress.close()
        seconds = seconds_before + time.monotonic() - started
        held_out = self._score(None)
        self._log(metrics, steps, **_validation(held_out))
        metrics.close()
        return self._write(held_out, seconds)

    def _step(self, step: int) -> torch.Tensor:
        """One optimizer step; returns the batch's mean loss, on the device."""
        recipe = self.recipe
        rate = learning_rate_at(
            step,
            recipe.steps,
            peak=recipe.learning_rate,
            warmup_ratio=recipe.warmup_ratio,
            final_ratio=recipe.final_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch, micro = self.batches[step], recipe.micro_batch_size or recipe.batch_size
        total = torch.zeros((), device=self.device)
        for start in range(0, recipe.batch_size, micro):
            loss = self._loss(batch, slice(start, start + micro)) / recipe.tokens_per_step
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _loss(self, batch: Batch, rows: slice) -> torch.Tensor:
        """Summed loss of some rows of a batch."""
        inputs, targets = (torch.from_numpy(a[rows]).to(self.device) for a in (batch.inputs, batch.targets))
        documents = None
        if batch.document_ids is not None:
            documents = torch.from_numpy(batch.document_ids[rows]).to(self.device)
        with autocast(self.device, self.recipe.precision):
            hidden = self.decoder(inputs, document_ids=documents)
            return linear_cross_entropy(hidden.flatten(0, 1), self.model.lm_head.weight, targets.flatten())

    def _score(self, max_tokens: int | None) -> Score:
        with autocast(self.device, self.recipe.precision):
            return score(
                self.model,
                self.data.valid,
                sequence_length=self.recipe.sequence_length,
                batch_size=self.recipe.micro_batch_size or self.recipe.batch_size,
                max_tokens=max_tokens,
                mask_documents_at=self.eos_id,
            )

    def _log(self, metrics: MetricsWriter, step: int, **values: float) -> None:
        metrics.write(step, tokens=step * self.recipe.tokens_per_step, **values)

    def _write(self, held_out: Score, seconds: float) -> dict[str, Any]:
        checkpoint.save(self.model, self.out / "model", tokenizer=self.data.tokenizer)
        result = {
            "validation": held_out.to_dict(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokens": self.recipe.steps * self.recipe.tokens_per_step,
            "steps": self.recipe.steps,
            "seconds": seconds,
            "environment": describe_environment(),
        }
        write_json(self.out / RESULT, result)
        return result


def _validation(held_out: Score) -> dict[str, float]:
    return {
        "validation_loss": held_out.loss,
        "validation_perplexity": held_out.perplexity,
        "validation_bits_per_byte": held_out.bits_per_byte,
    }
