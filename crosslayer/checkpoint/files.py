"""Folders that are either whole or not there: written beside, checksummed, then renamed."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from crosslayer.errors import UserError
from crosslayer.files import flush, read_json, write_json

CHECKSUMS = "checksums.json"
CONFIG = "config.json"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A scratch folder for a model that becomes `target` when the block ends well, and disappears when it does not.

    The files in it are checksummed into `checksums.json`.

    Raises:
        UserError: `target` is something that `check_target` refuses to replace, or cannot be written.
    """
    target = target.resolve()  # a link goes on to show where it does
    check_target(target)
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield scratch
        seal(scratch, {file.name: sha256(file) for file in sorted(scratch.iterdir())})
        scratch.chmod(0o755)
        if target.exists():
            old = scratch.with_name(scratch.name + ".old")
            target.rename(old)
            try:
                scratch.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            scratch.rename(target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def check_target(target: Path) -> None:
    """That `new_folder` would replace nothing but an empty folder or a model's, as it was written: with a
    `config.json`, and nothing that its `checksums.json` does not list.

    Raises:
        UserError: `target` is something else; the message names what is in the way.
    """
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if target.exists() and CONFIG not in names and (names or not target.is_dir()):
        raise UserError(f"{target}: exists and is not a folder with a {CONFIG}; choose another place")
    listed = {CHECKSUMS, *read_json(target / CHECKSUMS)} if CHECKSUMS in names else set()
    if foreign := max(names - listed, default=None):  # hidden ones come first
        raise UserError(
            f"{target}: exists, and {foreign} in it was not saved with a model (no {CHECKSUMS} lists it); "
            "choose another place"
        )


def seal(folder: Path, checksums: dict[str, str]) -> None:
    """Write the SHA-256 of the folder's files, by name, into it, and make sure that all of it is on the disk."""
    write_json(folder / CHECKSUMS, checksums)
    for path in (*folder.iterdir(), folder):
        flush(path)


def check_folder(folder: Path) -> None:
    """Compare every file named in the folder's `checksums.json`, if it has one, with its SHA-256.

    Raises:
        UserError: a file is missing or its content has changed.
    """
    listing = folder / CHECKSUMS
    if not listing.exists():
        return
    for name, expected in read_json(listing).items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing, though {CHECKSUMS} lists it")
        if sha256(file) != expected:
            raise UserError(f"{file}: damaged or changed since it was saved (its SHA-256 differs from {CHECKSUMS})")


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
