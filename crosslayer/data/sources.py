"""Readers of text: the standard library's sources, text files, JSON lines, Parquet, Hugging Face datasets.

A reader is a generator of (where, text, done): a place to name in messages, the text of a document, and how much of
the source has been read with it, from 0 to 1 (0 throughout where that cannot be known).
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import json
import lzma
import os
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import IO, Any, cast

from crosslayer.errors import UserError

Raw = tuple[str, str, float]

# Tests, generated tables, and what some systems package apart from the rest of the standard library.
# fmt: off
_STDLIB_EXCLUDED_FOLDERS = {
    "__phello__", "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo",
}
# fmt: on
_STDLIB_EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")
# A text file longer than this many bytes is cut at line ends into documents of about this size.
TEXT_DOCUMENT = 2 * 2**20
_SUFFIXES = {
    "text": (".txt", ".txt.gz", ".txt.xz"),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.xz"),
    "parquet": (".parquet",),
}


def _read_stdlib(paths: Sequence[str], field: str) -> Iterator[Raw]:
    for name, path in stdlib_files():
        try:
            yield name, path.read_bytes().decode().replace("\r\n", "\n"), 0.0
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def stdlib_files() -> list[tuple[str, Path]]:
    """Relative name and path of the standard library's sources, in the order of a hash of the name, so that a byte
    budget takes a fair sample of them rather than the first letters of the alphabet."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in _STDLIB_EXCLUDED_FOLDERS and not name.startswith("config-")
        ]
        for file in files:
            if file.endswith(".py") and not file.startswith(_STDLIB_EXCLUDED_PREFIXES):
                path = Path(folder, file)
                found.append((path.relative_to(root).as_posix(), path))
    if not found:
        raise UserError(
            f"this Python ({platform.python_version()}) has no standard-library sources under {root}; "
            "set the data source to files of your own"
        )
    return sorted(found, key=lambda item: hashlib.blake2b(item[0].encode(), digest_size=8).digest())


def _read_text(paths: Sequence[str], field: str) -> Iterator[Raw]:
    for path, num_bytes, _, lines, done in _blocks(paths, "text"):
        yield str(path), _decode(b"".join(lines), str(path), num_bytes), done


def _read_jsonl(paths: Sequence[str], field: str) -> Iterator[Raw]:
    for path, _, num_lines, lines, done in _blocks(paths, "jsonl"):
        for number, line in enumerate(lines, start=num_lines + 1):
            where = f"{path}, line {number}"
            text = _decode(line, where, 0)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON: {error}") from None
            yield where, _field(row, field, where), done


def _read_parquet(paths: Sequence[str], field: str) -> Iterator[Raw]:
    parquet = _import("pyarrow.parquet", "Parquet files")
    files = expand_paths(paths, "parquet")
    for position, path in enumerate(files):
        try:
            file = parquet.ParquetFile(path)
            names = file.schema_arrow.names
            if field not in names:
                raise UserError(f"{path}: no column {field!r}; it has {', '.join(names)}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    where = f"{path}, row {row}"
                    text = _field({field: value}, field, where)
                    yield where, text, (position + row / file.metadata.num_rows) / len(files)
        except UserError:
            raise
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            raise UserError(f"{path}: cannot be read as Parquet: {_first_line(error)}") from error


def _read_huggingface(paths: Sequence[str], field: str) -> Iterator[Raw]:
    datasets = _import("datasets", "Hugging Face datasets")
    for name in paths:
        repository, subset, split = [*name.split(":"), "", ""][:3]
        if name.count(":") > 2:
            raise UserError(f"dataset {name!r} is not NAME[@REVISION][:SUBSET[:SPLIT]]")
        repository, _, revision = repository.partition("@")
        try:
            rows = iter(
                datasets.load_dataset(
                    repository, subset or None, split=split or "train", revision=revision or None, streaming=True
                )
            )
        except Exception as error:  # a missing name, split, file or network each has a class of its own
            raise UserError(f"dataset {name!r} cannot be opened: {_first_line(error)}") from error
        for number in count():
            where = f"dataset {name}, row {number}"
            try:
                row = next(rows, None)
            except Exception as error:  # of pyarrow, a decompressor, the network, ...
                raise UserError(f"{where}: cannot be read: {_first_line(error)}") from error
            if row is None:
                break
            yield where, _field(row, field, where), 0.0


READERS: dict[str, Callable[[Sequence[str], str], Iterator[Raw]]] = {
    "stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "huggingface": _read_huggingface,
}


def expand_paths(paths: Sequence[str], source: str) -> list[Path]:
    """The files that files, folders (searched for the source's usual suffixes) and glob patterns stand for."""
    found: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file() and file.name.endswith(_SUFFIXES[source])]
            if not files:
                raise UserError(
                    f"folder {name} has no {', '.join(_SUFFIXES[source])} files; "
                    f"for others give a pattern such as {name}/**/*.md"
                )
        elif path.is_file():
            files = [path]
        else:
            matches = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
            files = [match for match in matches if match.is_file()]
            if not files:
                raise UserError(f"{name}: no such file, folder or pattern with matches")
        found += sorted(files, key=lambda file: file.as_posix())
    return list(dict.fromkeys(found))


def _blocks(paths: Sequence[str], source: str) -> Iterator[tuple[Path, int, int, list[bytes], float]]:
    """Lines of each file in turn, decompressed, some TEXT_DOCUMENT bytes at a time: the path, how many bytes and lines
    of the file came before, the lines, and the share of all files' bytes that has been read."""
    files = expand_paths(paths, source)
    sizes = [file.stat().st_size for file in files]
    total = sum(sizes) or 1
    before = 0
    for path, size in zip(files, sizes, strict=True):
        num_bytes = num_lines = 0
        try:
            with path.open("rb") as raw, _decompressed(path, raw) as stream:
                while lines := stream.readlines(TEXT_DOCUMENT):
                    yield path, num_bytes, num_lines, lines, (before + raw.tell()) / total
                    num_bytes += sum(map(len, lines))
                    num_lines += len(lines)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        before += size


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if path.suffix == ".xz":
        return lzma.LZMAFile(raw)
    return raw


def _decode(data: bytes, where: str, position: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {position + error.start}") from None


def _field(row: Any, field: str, where: str) -> str:
    """The row's text; a null is no text."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object with a field {field!r}")
    if field not in row:
        raise UserError(f"{where}: no field {field!r}; it has {', '.join(map(str, row))}")
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is a {type(text).__name__}, not text")
    return text or ""


def _import(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"reading {what} needs {module.split('.')[0]}: pip install 'crosslayer[data]'") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
