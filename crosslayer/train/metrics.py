"""Where a run's figures go: a progress line, metrics.jsonl, and TensorBoard where asked for."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from crosslayer.errors import UserError
from crosslayer.files import write_whole


class MetricsWriter:
    """Appends one JSON object a line to `folder/metrics.jsonl`, from `first_step` on.

    Lines of later steps, left by a run that was cut off after its last checkpoint, are dropped.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool) -> None:
        summary_writer = import_summary_writer() if tensorboard else None
        self._file = folder / "metrics.jsonl"
        kept = [line for line in _lines(self._file) if line["step"] <= first_step]
        write_whole(self._file, "".join(json.dumps(line) + "\n" for line in kept))
        self._tensorboard: Any = None
        if summary_writer:
            self._tensorboard = summary_writer(folder / "tensorboard", purge_step=first_step + 1)

    def write(self, step: int, **values: float) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


def import_summary_writer() -> Any:
    """TensorBoard's writer.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "train.tensorboard is on, but TensorBoard is not installed: pip install 'crosslayer[tensorboard]'"
        ) from None
    return SummaryWriter


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return list(_lines(folder / "metrics.jsonl"))


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a process that was killed while writing it
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
            print(f"\r{text.ljust(self._width)}", end="", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)
        self._width = len(text)

    def close(self) -> None:
        """Leave the line on a terminal as it is and go on below it."""
        if self._live and self._width:
            print(file=self._stream, flush=True)


class Unseen:
    """Stands in for the writer and the line on processes that report nothing."""

    def write(self, step: int, **values: float) -> None: ...

    def show(self, text: str, *, last: bool = False) -> None: ...

    def close(self) -> None: ...


def clock(seconds: float) -> str:
    """Seconds as M:SS or H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
