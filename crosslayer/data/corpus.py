"""A corpus as data: which source, how it is split into training and validation text, which tokenizer cuts it.

Documents come as a stream, in an order that depends on nothing but the source; one is in memory at a time.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from crosslayer.data.sources import READERS, expand_paths, stdlib_files
from crosslayer.errors import UserError

Split = Literal["train", "valid"]

# Most UTF-8 bytes the standard-library corpus gives, so that it is about as large on every Python version.
STDLIB_BYTES = 6_000_000
# No document is longer (in characters): a longer one is cut at line ends, which bounds the memory that encoding takes.
LONGEST_DOCUMENT = 4 * 2**20
# A lone text file of which a part is to be held out is cut at line ends into documents of at most this many characters.
LONE_TEXT_DOCUMENT = 32 * 2**10


@dataclass(frozen=True)
class DataConfig:
    """A corpus and the tokenizer to cut it with.

    `source` is stdlib, text, jsonl, parquet or huggingface. `paths` and `valid_paths` (a string stands for a list of
    one) are files, folders or glob patterns; for huggingface they are dataset names, `NAME[@REVISION][:SUBSET[:SPLIT]]`
    with the split "train" unless named. Without `valid_paths`, about `valid_fraction` of the documents, chosen by a
    hash of their text (stdlib: of the file's path), is held out. `text_field` names the text's field or column.
    `max_bytes` is the most UTF-8 bytes read from the paths, and likewise from the validation paths; the text is cut
    there. `tokenizer` is an existing tokenizer.json or a folder with one, `eos_token` its end-of-text token where that
    is not obvious; without `tokenizer`, byte-level BPE with `vocab_size` tokens is trained on the training text.

    Raises:
        UserError: a value that is out of range or does not go with the source.
    """

    source: str = "stdlib"
    paths: tuple[str, ...] = ()
    valid_paths: tuple[str, ...] = ()
    valid_fraction: float = 0.05
    text_field: str = "text"
    max_bytes: int | None = None
    tokenizer: str | None = None
    eos_token: str | None = None
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        for name in ("paths", "valid_paths"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.source not in READERS:
            raise UserError(f"data source {self.source!r} is not known; known: {', '.join(READERS)}")
        if self.source == "stdlib" and (self.paths or self.valid_paths):
            raise UserError("data source stdlib takes no paths; for files of your own set source to text or jsonl")
        if self.source != "stdlib" and not self.paths:
            raise UserError(f"data source {self.source} needs paths: which text to read")
        if not 0 < self.valid_fraction < 1:
            raise UserError(f"data valid_fraction must lie between 0 and 1, got {self.valid_fraction!r}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UserError(f"data max_bytes must be positive, got {self.max_bytes!r}")
        if self.vocab_size < 257:
            raise UserError(
                f"data vocab_size must be at least 257 (256 bytes and end of text), got {self.vocab_size!r}"
            )
        if self.eos_token is not None and self.tokenizer is None:
            raise UserError("data eos_token goes with an existing tokenizer; a trained one has <|endoftext|>")


class Document(NamedTuple):
    """One document: its text, the text's length in UTF-8 bytes, the string whose hash decides whether it is held out,
    and how much of the source has been read with it (0 to 1; 0 where that cannot be known)."""

    text: str
    num_bytes: int
    key: str
    done: float


def split_documents(config: DataConfig) -> Iterator[tuple[Split, Document]]:
    """All documents of a source, each with the split it belongs to; the same ones in the same order every time.

    Without separate validation paths a document is held out by its hash, so identical documents stay on one side, and
    the split does not move when other documents come or go. At least one of two or more different ones is held out.

    Raises:
        UserError: a file, field or dataset that cannot be read, or a source with no text for one of the splits.
    """
    counts: dict[Split, int] = {"train": 0, "valid": 0}
    for split, document in _split_by_paths(config) if config.valid_paths else _split_by_hash(config):
        counts[split] += 1
        yield split, document
    where = f"data source {config.source} ({', '.join(config.paths) or 'standard library'})"
    if not any(counts.values()):
        raise UserError(f"{where} has no text")
    if not counts["train"]:
        raise UserError(f"{where} leaves no text to train on; give more, or lower valid_fraction")
    if not counts["valid"]:
        raise UserError(f"{where} has a single document, so none can be held out; set valid_paths or give more text")


def _split_by_paths(config: DataConfig) -> Iterator[tuple[Split, Document]]:
    for document in read_documents(config, config.paths):
        yield "train", document
    empty = True
    for document in read_documents(config, config.valid_paths):
        empty = False
        yield "valid", document
    if empty:
        raise UserError(f"validation paths {', '.join(config.valid_paths)} have no text")


def _split_by_hash(config: DataConfig) -> Iterator[tuple[Split, Document]]:
    lone_file = config.source == "text" and len(expand_paths(config.paths, "text")) == 1
    longest = LONE_TEXT_DOCUMENT if lone_file else LONGEST_DOCUMENT
    # The document with the lowest hash so far waits, with its copies: were none below the threshold, they are held out.
    waiting: list[Document] = []
    lowest = 1.0
    held_out = others = 0
    for document in read_documents(config, config.paths, longest):
        digest = hashlib.blake2b(document.key.encode(), digest_size=8, person=b"held out").digest()
        value = int.from_bytes(digest) / 2**64
        if value < config.valid_fraction:
            held_out += 1
            yield "valid", document
            continue
        if value > lowest:
            others += 1
            yield "train", document
            continue
        if value < lowest:
            others += len(waiting)
            yield from (("train", each) for each in waiting)
            waiting, lowest = [], value
        waiting.append(document)
    split: Split = "valid" if others and not held_out else "train"
    yield from ((split, document) for document in waiting)


def read_documents(config: DataConfig, paths: Sequence[str], longest: int = LONGEST_DOCUMENT) -> Iterator[Document]:
    """The documents under `paths`, read the way `config` says, without splitting; empty ones are left out, and one of
    more than `longest` characters is cut at line ends into several.

    Raises:
        UserError: a file, field or dataset that cannot be read, with the file and the place.
    """
    limit = config.max_bytes or sys.maxsize
    if config.source == "stdlib":
        limit = min(limit, STDLIB_BYTES)
    room = limit
    for where, whole, done in READERS[config.source](paths, config.text_field):
        for text in _cut(whole, longest):
            try:
                encoded = text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{where}: half a surrogate pair at character {error.start} is no text") from None
            last = len(encoded) >= room
            if last:
                text = encoded[:room].decode(errors="ignore")
                encoded = text.encode()
            room -= len(encoded)
            if text:
                key = where if config.source == "stdlib" else text
                yield Document(text, len(encoded), key, max(done, 1 - room / limit))
            if last:
                return


def _cut(text: str, longest: int) -> Iterator[str]:
    start = 0
    while len(text) - start > longest:
        end = text.rfind("\n", start, start + longest) + 1 or start + longest
        yield text[start:end]
        start = end
    yield text[start:]


def source_state(config: DataConfig) -> list[Any]:
    """What tells whether a source has changed: names, sizes and times of its files, or a hash of the standard library.

    A Hugging Face dataset is known by its name only; naming a revision pins it.
    """
    if config.source == "huggingface":
        return [config.paths, config.valid_paths]
    if config.source == "stdlib":
        digest = hashlib.blake2b(digest_size=16)
        for name, path in stdlib_files():
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return [STDLIB_BYTES, digest.hexdigest()]
    return [
        [
            (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
            for path in expand_paths(paths, config.source)
        ]
        for paths in (config.paths, config.valid_paths)
        if paths
    ]
