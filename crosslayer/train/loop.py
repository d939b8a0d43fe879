"""The training loop. Every process runs it; the first one reports and writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from crosslayer import checkpoint
from crosslayer.checkpoint.files import check_target
from crosslayer.checkpoint.state import Checkpoints
from crosslayer.data import PreparedData, TrainBatches
from crosslayer.environment import describe_environment
from crosslayer.errors import Stopped, UserError
from crosslayer.evaluate import Score, score
from crosslayer.files import claimed, read_json, write_json, writing_into
from crosslayer.model import Transformer
from crosslayer.settings import to_mapping
from crosslayer.train.config import MAY_CHANGE, TrainConfig
from crosslayer.train.host import autocast
from crosslayer.train.journal import Journal, require_finite
from crosslayer.train.metrics import require_installed
from crosslayer.train.parallel import whole_model
from crosslayer.train.processes import Processes, single_process
from crosslayer.train.step import TrainStep
from crosslayer.train.stop import StopSignal

CONFIG = "config.json"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
MODEL = "model"
LOCK = ".lock"


def train(
    config: TrainConfig, data: PreparedData, out: Path, *, label: str = "train", processes: Processes | None = None
) -> dict[str, Any]:
    """Train a model, going on from the newest checkpoint in `out` if there is one.

    `processes`, from `joined_processes`, call this together; without them the run has one process.

    `out` receives config.json, tokenizer/, metrics.jsonl, checkpoints/, the finished model folder model/ and
    result.json, whose content is returned: held-out scores, parameters, tokens, seconds of training and the machine. A
    run that has finished is not repeated.

    Raises:
        UserError: `out` belongs to a run with another config or other data, or another process is training in it; the
            model or the data cannot be trained with as the config says; or the loss is no longer a number.
        Stopped: SIGTERM has come while training; there is a checkpoint of the step that it stopped at.
    """
    processes = processes or single_process(config.train)
    result = out / RESULT
    # What cannot be built is refused before the folder is claimed for it.
    settings = {**to_mapping(config), "data_fingerprint": data.fingerprint}
    run = None if processes.on_first(result.exists) else _Run(config, data, out, label, processes, _identity(settings))
    with ExitStack() as held:

        def claim() -> None:
            if run is not None:
                check_target(out / MODEL)  # before the work that would be for nothing
                held.enter_context(_alone_in(out))
            claim_folder(out, settings)

        processes.on_first(claim)
        return processes.on_first(lambda: read_json(result)) if run is None else run.finish()


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Until the end of the block, or of the process, no other process trains in this folder.

    Raises:
        UserError: another one does, or the folder cannot be written.
    """
    with claimed(out / LOCK) as mine:
        if not mine:
            raise UserError(f"another process is training in {out}")
        yield


def claim_folder(out: Path, settings: dict[str, Any]) -> None:
    """Record in `out/config.json` what the run is, or check that it is the one recorded there, but for what MAY_CHANGE.

    Raises:
        UserError: the folder was started with other settings (the message names the first that differs), or cannot
            be written.
    """
    record = out / CONFIG
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            write_json(record, settings)
    now, before = _lasting(settings), _lasting(read_json(record))
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            what = f"{key} = {before.get(key)}, now it is {now.get(key)}"
            if key == "data_fingerprint":  # all settings of the data are the same
                what = "other data: the text, or the tokenizer, is not what it was"
            raise UserError(f"{out} was started with {what}; restore it to go on, or choose another output folder")


def _identity(settings: dict[str, Any]) -> str:
    """Tells the checkpoints of a run from those of others."""
    return hashlib.blake2b(json.dumps(_lasting(settings), sort_keys=True).encode(), digest_size=10).hexdigest()


def _lasting(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a run that run, as JSON has it: all settings but those that MAY_CHANGE."""
    flat = _flat(json.loads(json.dumps(settings)))
    return {key: value for key, value in flat.items() if key not in MAY_CHANGE}


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class _Run:
    def __init__(
        self, config: TrainConfig, data: PreparedData, out: Path, label: str, processes: Processes, identity: str
    ) -> None:
        self.config, self.recipe, self.data, self.out, self.label = config, config.train, data, out, label
        self.processes, self.identity = processes, identity
        recipe, tokenizer = self.recipe, data.tokenizer
        # Compiled blocks of earlier runs count towards PyTorch's limit, beyond which blocks silently run uncompiled.
        torch.compiler.reset()
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
        require_installed(tensorboard=recipe.tensorboard, wandb=recipe.wandb)

    def finish(self) -> dict[str, Any]:
        """Train from the newest checkpoint to the end, evaluate, and write the model and the result."""
        self.processes.on_first(self._keep_tokenizer)
        with closing(Checkpoints(self.out / CHECKPOINTS)) as checkpoints:
            state = checkpoints.load(self.model, self.step.optimizer)
            if state and state.get("run") != self.identity:
                raise UserError(f"{checkpoints.folder}: the checkpoint of step {state['step']} is that of another run")
            with closing(Journal(self.out, self.config, self.label, state)) as journal:
                self._train(state["step"] if state else 0, checkpoints, journal)
                seconds = journal.seconds
                held_out = self._score(
                    None, lambda n, total: journal.show(f"held-out text {n:,}/{total:,} tokens", last=n == total)
                )
                require_finite(held_out.loss, self.recipe.steps)
                journal.validate(self.recipe.steps, held_out)
        return self._write(held_out, seconds, {**journal.counts, "failed_checkpoints": checkpoints.failed})

    def _keep_tokenizer(self) -> None:
        """Beside the checkpoints, which are of no use without it."""
        with writing_into(self.out):
            (self.out / TOKENIZER).mkdir(exist_ok=True)
            self.data.tokenizer.save(self.out / TOKENIZER)

    def _train(self, first: int, checkpoints: Checkpoints, journal: Journal) -> None:
        """All steps from `first` on."""
        recipe, steps = self.recipe, self.recipe.steps
        save_every = recipe.checkpoint_every or steps + 1
        with StopSignal() as stop:
            for step in range(first, steps):
                done = step + 1
                journal.add(done, self.step(step, self.batches[step]))
                stopping = stop.requested()
                if done % recipe.log_every == 0 or done == steps:
                    journal.report(done, failed_checkpoints=checkpoints.failed)
                with journal.pause():
                    if recipe.eval_every and done % recipe.eval_every == 0 and done < steps:
                        journal.validate(done, self._score(recipe.eval_tokens))
                    if stopping or done % save_every == 0 or (done == steps and recipe.checkpoint_every):
                        journal.check(done)  # or good checkpoints would give way to dead weights
                        progress = {"run": self.identity, **journal.to_dict()}
                        checkpoints.save(done, self.model, self.step.optimizer, progress)
                if stopping:
                    checkpoints.wait()
                    newest = max(checkpoints.steps(), default=0)
                    text = f"stopped by SIGTERM at step {done} of {steps}; the same command goes on from step {newest}"
                    raise Stopped(text if self.processes.first else "")
            checkpoints.wait()  # before SIGTERM takes its usual effect again

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

    def _write(self, held_out: Score, seconds: float, troubles: dict[str, int]) -> dict[str, Any]:
        model = self.model if self.processes.mesh is None else whole_model(self.model)

        def write() -> dict[str, Any]:
            assert model is not None
            checkpoint.save(model, self.out / MODEL, tokenizer=self.data.tokenizer)
            result = {
                "validation": held_out.to_dict(),
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens": self.recipe.steps * self.recipe.tokens_per_step,
                "steps": self.recipe.steps,
                "seconds": seconds,
                **troubles,
                "processes": self.processes.count,
                "environment": describe_environment(),
            }
            with writing_into(self.out):
                write_json(self.out / RESULT, result)
            return result

        return self.processes.on_first(write)
