"""Token streams on disk: written once as checked shards, read back through memory maps.

A split's documents stand one after another, each closed by the end-of-text token, in shard files of bounded size. A
record is a token id (uint16 where the vocabulary allows, else uint32) and, in validation splits, the number of UTF-8
bytes of text that the token stands for, which makes bits per byte exact over any range of tokens.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from crosslayer.data.tokenizer import Tokenizer
from crosslayer.errors import UserError

SHARD_TOKENS = 2**26
_BATCH_CHARACTERS = 4 * 2**20  # text encoded at a time; encoding takes some 50 bytes of memory a character


def record_dtype(vocab_size: int, measured: bool) -> np.dtype[np.void]:
    """The record of a shard: the token and, where `measured`, the bytes of text it stands for. Little-endian."""
    token = ("token", "<u2" if vocab_size <= 2**16 else "<u4")
    return np.dtype([token, ("bytes", "<u4")] if measured else [token])


@dataclass(frozen=True)
class Shard:
    """A shard's line in the index: its file, what it holds, and the CRC-32 of its bytes."""

    file: str
    tokens: int
    documents: int
    text_bytes: int
    crc32: int


class TokenStream:
    """The tokens of one split, read-only and addressed by position.

    `len` is the number of tokens, end-of-text tokens included; `documents` and `text_bytes` count what they stand for.
    """

    def __init__(self, shards: Sequence[np.ndarray], documents: int, text_bytes: int) -> None:
        self.documents = documents
        self.text_bytes = text_bytes
        self._shards = list(shards)
        self._starts = list(accumulate((len(shard) for shard in shards), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def measured(self) -> bool:
        """Whether `read_bytes` is available."""
        return all("bytes" in (shard.dtype.names or ()) for shard in self._shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, int64 [stop - start]."""
        return self._read("token", start, stop)

    def read_bytes(self, start: int, stop: int) -> np.ndarray:
        """UTF-8 bytes of text that each token from start to stop - 1 stands for, int64 [stop - start]."""
        return self._read("bytes", start, stop)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        parts = [np.empty(0, dtype=np.int64)]
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            first = start - self._starts[number]
            part = self._shards[number][name][first : first + stop - start]
            parts.append(part.astype(np.int64))
            start += len(part)
            number += 1
        return np.concatenate(parts)

    @classmethod
    def from_texts(cls, tokenizer: Tokenizer, texts: Iterable[str]) -> TokenStream:
        """A measured stream in memory, one document a text, for text that is used once."""
        dtype = record_dtype(tokenizer.vocab_size, measured=True)
        shards, documents, text_bytes = [], 0, 0
        for batch in _batches(texts):
            shards += encode_documents(tokenizer, batch, dtype)
            documents += len(batch)
            text_bytes += sum(len(text.encode()) for text in batch)
        return cls(shards, documents, text_bytes)

    @classmethod
    def open(cls, folder: Path, dtype: np.dtype[np.void], shards: Sequence[Shard]) -> TokenStream:
        """The stream that `ShardWriter` wrote; every shard's size and checksum is verified first.

        Raises:
            UserError: a shard is missing, cut short or altered.
        """
        with ThreadPoolExecutor() as pool:  # hundreds of gigabytes to read, and checksums let go of the interpreter
            opened = list(pool.map(lambda shard: _open_shard(folder / shard.file, dtype, shard), shards))
        return cls(opened, sum(shard.documents for shard in shards), sum(shard.text_bytes for shard in shards))


def _open_shard(path: Path, dtype: np.dtype[np.void], shard: Shard) -> np.ndarray:
    expected = shard.tokens * dtype.itemsize
    if not path.is_file():
        raise UserError(f"token shard {path} is missing")
    if (size := path.stat().st_size) != expected:
        raise UserError(f"token shard {path} is damaged: {size:,} bytes where its index says {expected:,}")
    records = np.memmap(path, dtype=dtype, mode="r")
    if zlib.crc32(records.view(np.uint8).data) != shard.crc32:
        raise UserError(f"token shard {path} is damaged: its checksum is not the one in its index")
    return records


class ShardWriter:
    """Encodes documents and writes them as shards `NAME-00000.bin`, `NAME-00001.bin`, … of about `shard_tokens` tokens.

    Documents are encoded in batches, in parallel, so memory does not grow with their number. A batch is not divided
    between shards.
    """

    def __init__(
        self, folder: Path, name: str, tokenizer: Tokenizer, *, measured: bool, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self.dtype = record_dtype(tokenizer.vocab_size, measured)
        self._folder = folder
        self._name = name
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._pending: list[str] = []
        self._pending_characters = 0

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return sum(shard.tokens for shard in self._shards)

    def add(self, text: str) -> None:
        """One document. It may reach the disk only with later ones or with `close`."""
        self._pending.append(text)
        self._pending_characters += len(text)
        if self._pending_characters >= _BATCH_CHARACTERS:
            self._flush()

    def close(self) -> list[Shard]:
        """Writes what is left and returns the index lines of all shards."""
        self._flush()
        return self._shards

    def _flush(self) -> None:
        texts, self._pending, self._pending_characters = self._pending, [], 0
        if not texts:
            return
        if not self._shards or self._shards[-1].tokens >= self._shard_tokens:
            self._shards.append(Shard(f"{self._name}-{len(self._shards):05d}.bin", 0, 0, 0, 0))
        last = self._shards[-1]
        records = np.concatenate(encode_documents(self._tokenizer, texts, self.dtype))
        content = records.tobytes()
        with (self._folder / last.file).open("ab") as file:
            file.write(content)
        self._shards[-1] = Shard(
            last.file,
            last.tokens + len(records),
            last.documents + len(texts),
            last.text_bytes + sum(len(text.encode()) for text in texts),
            zlib.crc32(content, last.crc32),
        )


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype[np.void]) -> list[np.ndarray]:
    """Each document as records, closed by end of text.

    Bytes of text that no token stands for (a tokenizer may drop some) count with the end-of-text token, so a
    document's byte counts always add up to its length.
    """
    documents = []
    if "bytes" in (dtype.names or ()):
        for text, (ids, widths) in zip(texts, tokenizer.encode_measured(texts), strict=True):
            records = np.empty(len(ids) + 1, dtype=dtype)
            records["token"] = [*ids, tokenizer.eos_id]
            records["bytes"][:-1] = widths
            records["bytes"][-1] = len(text.encode()) - widths.sum()
            documents.append(records)
    else:
        for ids in tokenizer.encode_batch(texts):
            documents.append(np.array([*ids, tokenizer.eos_id], dtype=dtype["token"]).view(dtype))
    return documents


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
