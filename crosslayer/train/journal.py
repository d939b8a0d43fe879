"""What a run tells about itself: figures followed step by step, written down now and then, kept in checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crosslayer.errors import Diverged
from crosslayer.evaluate import Score
from crosslayer.ranks import rank
from crosslayer.settings import to_mapping
from crosslayer.train.config import TrainConfig
from crosslayer.train.metrics import MetricsWriter, ProgressLine, clock
from crosslayer.train.monitor import SKIPPED_IN_A_ROW, Monitor
from crosslayer.train.step import StepOutput


class Journal:
    """The figures of a run in `folder`, from the beginning or from the `state` that `to_dict` gave. Rank 0 writes."""

    def __init__(self, folder: Path, config: TrainConfig, label: str, state: Mapping[str, Any] | None) -> None:
        self._recipe = config.train
        self._first_step: int = state["step"] if state else 0
        self._seconds_before: float = state["seconds"] if state else 0.0
        self._monitor = Monitor(**state["monitor"]) if state else Monitor()
        num_lines = state["num_lines"] if state else 0
        self._metrics = MetricsWriter(folder, to_mapping(config), step=self._first_step, num_lines=num_lines)
        self._progress = ProgressLine(label)
        self._started = self._rated_at = time.monotonic()
        self._rated_step = self._first_step

    @property
    def seconds(self) -> float:
        """How long the run has taken, in all processes that have worked at it."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def counts(self) -> dict[str, int]:
        """Steps that were skipped, and losses that were spikes."""
        return self._monitor.counts()

    def add(self, done: int, output: StepOutput) -> None:
        """Take note of the step after which `done` are done, without waiting for it but for every tenth.

        Raises:
            Diverged: as `check` does.
        """
        self._monitor.add(output)
        if self._monitor.unsettled >= SKIPPED_IN_A_ROW:
            self.check(done)

    def check(self, done: int) -> None:
        """Wait for the steps up to `done`, and make sure that there is something left to train.

        Raises:
            Diverged: a loss since the last report is not finite, or too many steps in a row had to be skipped.
        """
        monitor = self._monitor
        monitor.settle()
        require_finite(monitor.sum_loss, done)
        if monitor.skipped_in_a_row >= SKIPPED_IN_A_ROW or monitor.skipped_steps == self._recipe.steps:
            raise Diverged(
                f"step {done}: no finite gradients in the last {monitor.skipped_in_a_row} steps, all of them skipped; "
                "lower train.learning_rate or train.clip"
            )

    def report(self, done: int, *, failed_checkpoints: int = 0) -> None:
        """Wait for the steps up to `done`, and write down how those since the last report were.

        Raises:
            Diverged: as `check` does.
        """
        self.check(done)
        recipe, monitor = self._recipe, self._monitor
        now = time.monotonic()
        rate = (done - self._rated_step) * recipe.tokens_per_step / (now - self._rated_at)
        left = clock((recipe.steps - done) * (now - self._started) / (done - self._first_step))
        self._rated_at, self._rated_step = now, done
        means, troubles = monitor.mean_since_last(), monitor.counts()
        if failed_checkpoints:
            troubles["failed_checkpoints"] = failed_checkpoints
        self._write(done, **means, tokens_per_second=rate, **troubles)
        loss = f"loss {means['loss']:.3f}" if means else "skipped"
        notes = "".join(f"  {name.replace('_', ' ')} {count}" for name, count in troubles.items() if count)
        text = f"step {done}/{recipe.steps}  {loss}  {rate:,.0f} tokens/s  {left} left{notes}"
        self.show(text, last=done == recipe.steps)

    def validate(self, done: int, held_out: Score) -> None:
        """Write down how the model does on held-out text after step `done`."""
        self._write(
            done,
            validation_loss=held_out.loss,
            validation_perplexity=held_out.perplexity,
            validation_bits_per_byte=held_out.bits_per_byte,
        )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count in the tokens per second, which are those of training alone."""
        paused_at = time.monotonic()
        yield
        self._rated_at += time.monotonic() - paused_at

    def show(self, text: str, *, last: bool = False) -> None:
        """Show how far the run is, to who watches."""
        if rank() == 0:
            self._progress.show(text, last=last)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, beside the step. Waits for the steps so far."""
        self._metrics.flush()
        return {
            "seconds": self.seconds,
            "num_lines": self._metrics.num_lines,
            "monitor": self._monitor.to_dict(),
        }

    def close(self) -> None:
        self._metrics.close()
        self._progress.close()

    def _write(self, step: int, **values: float) -> None:
        self._metrics.write(step, tokens=step * self._recipe.tokens_per_step, **values)


def require_finite(loss: float, step: int) -> None:
    """Stop where the loss after `step` says that there is nothing left to train.

    Raises:
        Diverged: it is infinite or no number.
    """
    if not math.isfinite(loss):
        raise Diverged(f"step {step}: the loss is {loss}; lower train.learning_rate or train.clip")
