"""Where a run's figures go: a progress line, metrics.jsonl, and TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from crosslayer.errors import UserError
from crosslayer.files import flush, read_json, say, write_json, write_whole, writing_into
from crosslayer.ranks import rank

METRICS = "metrics.jsonl"


class Destination(Protocol):
    """One of the places that figures go to."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """Appends one JSON object a line to `folder/metrics.jsonl`, after the first `num_lines`.

    Lines beyond those, left by a run that was cut off after its last checkpoint, are dropped. While they
    cannot be written, as the disk is full for instance, lines wait in memory: no run ends for want of a few bytes.
    """

    def __init__(self, folder: Path, num_lines: int) -> None:
        self._file = folder / METRICS
        self._waiting = ""
        kept = "".join(json.dumps(line) + "\n" for line in read_metrics(folder)[:num_lines])
        with writing_into(folder):
            write_whole(self._file, kept)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._waiting += json.dumps({"step": step, **values}) + "\n"
        with _failure_reported(self._file):
            whole = self._file.stat().st_size
            try:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(self._waiting)
            except OSError:
                os.truncate(self._file, whole)
                raise
            self._waiting = ""

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in `folder/tensorboard`; what a run that was cut off wrote after `step` is hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        writer = _import("torch.utils.tensorboard", "tensorboard", "TensorBoard").SummaryWriter
        self._writer = writer(folder / "tensorboard", purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project, whose files are in `folder/wandb` and its id in `folder/wandb.json`, so that
    a run that is started again goes on there too. What is logged twice, Weights & Biases ignores the second time."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        record = folder / "wandb.json"
        if not record.exists():
            write_json(record, {"id": uuid.uuid4().hex[:16]})
        self._run = _import("wandb", "wandb", "Weights & Biases").init(
            project=project,
            id=read_json(record)["id"],
            resume="allow",
            name=folder.name,
            config=dict(config),
            allow_val_change=True,
            dir=str(folder),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MetricsWriter:
    """All destinations that the config of a run asks for, in its `folder`; for processes other than rank 0, none.

    A run that goes on says from which `step`, and how many lines it had written by then, `num_lines`.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, step: int, num_lines: int) -> None:
        self.num_lines = num_lines
        self._folder = folder
        self._destinations: list[Destination] = []
        if rank() != 0:
            return
        self._destinations.append(MetricsFile(folder, num_lines))
        if config["train"]["tensorboard"]:
            self._destinations.append(TensorBoard(folder, step))
        if (project := config["train"]["wandb"]) is not None:
            self._destinations.append(WeightsAndBiases(folder, project, config))

    def write(self, step: int, **values: float) -> None:
        self.num_lines += 1
        for destination in self._destinations:
            destination.write(step, values)

    def flush(self) -> None:
        """Make sure that the lines so far are on the disk, before a checkpoint counts on them."""
        if self._destinations:
            with _failure_reported(self._folder / METRICS):
                flush(self._folder / METRICS)

    def close(self) -> None:
        for destination in self._destinations:
            destination.close()


@contextmanager
def _failure_reported(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        warnings.warn(f"{file} cannot be written: {error.strerror}; its lines wait in memory", stacklevel=4)


def require_installed(*, tensorboard: bool, wandb: str | None) -> None:
    """Before any work: what is asked for is there.

    Raises:
        UserError: TensorBoard or Weights & Biases is not installed.
    """
    if tensorboard:
        _import("torch.utils.tensorboard", "tensorboard", "TensorBoard")
    if wandb is not None:
        _import("wandb", "wandb", "Weights & Biases")


def _import(module: str, setting: str, product: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"train.{setting} is on, but {product} is not installed: pip install 'crosslayer[{setting}]'"
        ) from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    file = folder / METRICS
    if not file.exists():
        return []
    lines = []
    for line in file.read_bytes().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the last line of a process, or a machine, that went down while writing it
            break
    return lines


class ProgressLine:
    """One line that is rewritten on a terminal, and printed now and then where the output is a file."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._printed_at = -math.inf
        self._width = 0

    def show(self, text: str, *, last: bool = False) -> None:
        """Show `text` after the label. The `last` of a kind is never left out."""
        now = time.monotonic()
        if not self._live and not last and now - self._printed_at < self.SECONDS_BETWEEN_LINES:
            return
        self._printed_at = now
        text = f"{self._label}  {text}"
        if self._live:
            say(f"\r{text.ljust(self._width)}", end="", stream=self._stream)
        else:
            say(text, stream=self._stream)
        self._width = len(text)

    def close(self) -> None:
        """Leave the line on a terminal as it is and go on below it."""
        if self._live and self._width:
            say("", stream=self._stream)


def clock(seconds: float) -> str:
    """Seconds as M:SS or H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
