"""Files that are either whole or not there: written beside their place, then renamed. And what is only said."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from crosslayer.errors import UserError


def write_whole(file: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) so that `file` is at every moment absent, the old one, or the whole new one."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(beside)  # or a crash of the machine could leave the name without the content
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make sure that a file, or a folder's list of names, is on the disk before we go on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, data: Any) -> None:
    """Write JSON as `write_whole` does."""
    write_whole(file, json.dumps(data, indent=2) + "\n")


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turns what keeps a file of an output folder from being written into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written: {error.strerror}") from error


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Whether no other process has claimed this file; if so, it is this one's until the block, or the process, ends.

    Raises:
        UserError: its folder cannot be written.
    """
    with writing_into(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
    with lock:
        mine = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError:  # a file system without locks
            pass
        yield mine


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError names the file where it is missing, broken, or something else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: want a JSON object")
    return data


def say(text: str, *, end: str = "\n", stream: TextIO | None = None) -> None:
    """Print for those who watch, on stderr unless another `stream` is given. What is only said ends no run: where it
    cannot be written (a log on a full disk, a terminal that has gone) it is left unsaid."""
    with suppress(OSError):
        print(text, end=end, file=stream or sys.stderr, flush=True)
