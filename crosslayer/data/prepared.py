"""From a DataConfig to token streams: prepared once, kept under a key, re-used while nothing has changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from crosslayer.data.corpus import DataConfig, source_state, split_documents
from crosslayer.data.shards import SHARD_TOKENS, Shard, ShardWriter, TokenStream, record_dtype
from crosslayer.data.tokenizer import Tokenizer
from crosslayer.errors import UserError
from crosslayer.files import say

Progress = Callable[[str], None]

# Raise it when the same config would be prepared differently than before.
_FORMAT = 2
# A tokenizer is trained on at most this many bytes of training text, the first ones.
TOKENIZER_BYTES = 64_000_000
# What an index says about the content of a folder: the fingerprint is a hash of it.
_CONTENT = ("tokenizer_crc32", "train", "valid")
_SECONDS_BETWEEN_REPORTS = 5.0


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer and the token streams of the training and the validation split. `valid` is measured: it knows how
    many bytes of text each token stands for. `fingerprint` names exactly this content, wherever it came from."""

    tokenizer: Tokenizer
    train: TokenStream
    valid: TokenStream
    fingerprint: str
    folder: Path

    def summary(self) -> str:
        """One line: sizes of both splits and of the vocabulary."""
        train, valid = self.train, self.valid
        return (
            f"{len(train):,} training tokens ({train.text_bytes / 1e6:.2f} MB, {train.documents:,} documents), "
            f"{len(valid):,} validation tokens ({valid.text_bytes / 1e6:.2f} MB, {valid.documents:,} documents), "
            f"vocabulary {self.tokenizer.vocab_size:,}, {train.text_bytes / len(train):.2f} bytes per token"
        )


def default_cache_dir() -> Path:
    """CROSSLAYER_CACHE, else crosslayer in XDG_CACHE_HOME, else ~/.cache/crosslayer."""
    if chosen := os.environ.get("CROSSLAYER_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crosslayer"


def prepare(config: DataConfig, cache_dir: Path | None = None, progress: Progress = say) -> PreparedData:
    """The tokenizer and token streams of `config`, from the cache where they are there and whole, else made now.

    They are kept in `cache_dir` / data / KEY; the key covers the config, the state of the source's files and the
    tokenizer, so any change makes a new folder. A damaged folder is reported and made again. Processes that prepare the
    same data at once do not disturb each other.

    Raises:
        UserError: a source or tokenizer that cannot be read, or a cache folder that cannot be written.
    """
    tokenizer = Tokenizer.load(config.tokenizer, config.eos_token) if config.tokenizer else None
    key = _key(config, tokenizer)
    folder = (cache_dir or default_cache_dir()) / "data" / key
    if folder.exists():
        try:
            return open_prepared(folder)
        except UserError as error:
            progress(f"{error}; preparing the data again")
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(mkdtemp(prefix=f".{key}-", dir=folder.parent))
        _build(config, tokenizer, beside, progress)
        _publish(beside, folder)
    except OSError as error:
        raise UserError(
            f"cache folder {folder.parent} cannot be written ({error.strerror or error}); set CROSSLAYER_CACHE"
        ) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
    data = open_prepared(folder)
    progress(f"prepared {data.summary()}")
    return data


def open_prepared(folder: Path) -> PreparedData:
    """What `prepare` left in `folder`, after verifying all of it.

    Raises:
        UserError: the index, the tokenizer or a shard is missing, cut short or altered.
    """
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        fingerprint, content = index["fingerprint"], {name: index[name] for name in _CONTENT}
        shards = {split: [Shard(**shard) for shard in index[split]] for split in ("train", "valid")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"prepared data {folder} is damaged: no usable index.json ({error})") from error
    if _hash(content) != fingerprint:
        raise UserError(f"prepared data {folder} is damaged: its index.json is altered")
    if _tokenizer_crc32(folder) != content["tokenizer_crc32"]:
        raise UserError(f"prepared data {folder} is damaged: its tokenizer is missing or altered")
    tokenizer = Tokenizer.load(folder)
    train = TokenStream.open(folder, record_dtype(tokenizer.vocab_size, measured=False), shards["train"])
    valid = TokenStream.open(folder, record_dtype(tokenizer.vocab_size, measured=True), shards["valid"])
    return PreparedData(tokenizer, train, valid, fingerprint, folder)


def _key(config: DataConfig, tokenizer: Tokenizer | None) -> str:
    """The state of the source stands for its paths, and the tokenizer's content for its path."""
    settings = asdict(config)
    for name in ("paths", "valid_paths", "tokenizer", "eos_token"):
        del settings[name]
    if tokenizer is not None:
        settings["vocab_size"] = tokenizer.files()
    return _hash([_FORMAT, TOKENIZER_BYTES, settings, source_state(config)])


def _hash(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=10).hexdigest()


def _build(config: DataConfig, tokenizer: Tokenizer | None, folder: Path, progress: Progress) -> None:
    """Fills `folder`, the index last."""
    if tokenizer is None:
        progress(f"training a tokenizer with {config.vocab_size:,} tokens")
        tokenizer = Tokenizer.train(_tokenizer_texts(config), config.vocab_size)
    tokenizer.save(folder)
    writers = {
        "train": ShardWriter(folder, "train", tokenizer, measured=False, shard_tokens=SHARD_TOKENS),
        "valid": ShardWriter(folder, "valid", tokenizer, measured=True, shard_tokens=SHARD_TOKENS),
    }
    started = reported = time.monotonic()
    num_bytes = 0
    for split, document in split_documents(config):
        writers[split].add(document.text)
        num_bytes += document.num_bytes
        now = time.monotonic()
        if now - reported > _SECONDS_BETWEEN_REPORTS:
            reported = now
            progress(_progress_line(num_bytes, document.done, now - started))
    content: dict[str, Any] = {name: [asdict(shard) for shard in writer.close()] for name, writer in writers.items()}
    content["tokenizer_crc32"] = _tokenizer_crc32(folder)
    index = {"fingerprint": _hash(content), "config": asdict(config), **content}
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tokenizer_texts(config: DataConfig) -> Iterator[str]:
    taken = 0
    for split, document in split_documents(config):
        if split == "train":
            taken += document.num_bytes
            yield document.text
            if taken >= TOKENIZER_BYTES:
                return


def _tokenizer_crc32(folder: Path) -> int | None:
    try:
        names = ("tokenizer.json", "tokenizer_config.json")
        return zlib.crc32(b"".join((folder / name).read_bytes() for name in names))
    except OSError:
        return None


def _progress_line(num_bytes: int, done: float, seconds: float) -> str:
    line = f"tokenising: {num_bytes / 1e6:.1f} MB, {num_bytes / 1e6 / seconds:.1f} MB/s"
    if done > 0:
        left = seconds * (1 - done) / done
        line += f", {done:.0%} done, {int(left) // 60}:{int(left) % 60:02d} left"
    return line


def _publish(beside: Path, folder: Path) -> None:
    """Renames `beside` to `folder`, unless another process has put the same data there; what is damaged gives way."""
    while True:
        try:
            beside.rename(folder)
            return
        except OSError:
            if not folder.exists():
                raise
        try:
            open_prepared(folder)
            return
        except UserError:
            damaged = Path(mkdtemp(prefix=".damaged-", dir=folder.parent))
            with suppress(OSError):  # another process may have moved it just now
                folder.rename(damaged / folder.name)
            shutil.rmtree(damaged, ignore_errors=True)
