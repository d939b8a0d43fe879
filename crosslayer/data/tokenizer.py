"""Text to token ids and back: a byte-level BPE trained on the spot, or any existing tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from crosslayer.errors import UserError
from crosslayer.files import read_json, write_whole

END_OF_TEXT = "<|endoftext|>"
# What existing tokenizers call the token that ends a document, the most telling first.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eos|>", "[EOS]")


class Tokenizer:
    """A `tokenizers.Tokenizer` (`backend`) with an end-of-text token (`eos_token`, `eos_id`).

    `vocab_size` is the largest id plus one. Text is encoded as written: nothing is put before or after it, and the name
    of a special token inside a text is ordinary text.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, eos_token: str = END_OF_TEXT, config: dict[str, Any] | None = None
    ) -> None:
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise UserError(f"the tokenizer has no token {eos_token!r} to end a text with; name its own with eos_token")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        self.eos_token = eos_token
        self.eos_id: int = eos_id
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._config = config or {"tokenizer_class": "PreTrainedTokenizerFast"}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE learnt from `texts`: the same texts give the same tokenizer, and every text survives encoding
        and decoding unchanged. `vocab_size` counts the 256 bytes and <|endoftext|>; little text gives fewer tokens."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path, eos_token: str | None = None) -> Tokenizer:
        """The tokenizer in a tokenizer.json or in a folder that has one. Its end-of-text token is `eos_token`, else
        the one that the tokenizer_config.json beside it names, else the first of the usual names that it knows.

        Raises:
            UserError: a missing or unreadable file, or no end-of-text token.
        """
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"tokenizer {file} cannot be read: {error.strerror}") from error
        except Exception as error:  # tokenizers raises bare Exception for what it cannot parse
            raise UserError(f"{file} is not a tokenizer.json: {error}") from error
        config_file = file.with_name("tokenizer_config.json")
        config = read_json(config_file) if config_file.is_file() else {}
        named = eos_token or config.get("eos_token")
        if isinstance(named, dict):  # older configs spell an added token out
            named = named.get("content")
        if named is None:
            named = next((name for name in _END_OF_TEXT_NAMES if backend.token_to_id(name) is not None), None)
        if named is None:
            raise UserError(f"{file} has no end-of-text token that is known by name; name it with eos_token")
        if not isinstance(named, str):
            raise UserError(f"{config_file}: eos_token must be text, got {named!r}")
        return cls(backend, named, config)

    def files(self) -> dict[str, str]:
        """Names and contents of tokenizer.json and tokenizer_config.json, from which `load` and transformers restore
        it. What a loaded tokenizer_config.json said beside the end-of-text token is kept."""
        config = json.dumps(self._config | {"eos_token": self.eos_token}, indent=2, ensure_ascii=False)
        return {"tokenizer.json": self.backend.to_str(pretty=True) + "\n", "tokenizer_config.json": config + "\n"}

    def save(self, folder: str | Path) -> None:
        """Writes `files` into an existing folder, each beside its place and then renamed."""
        for name, content in self.files().items():
            write_whole(Path(folder, name), content)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, encoded in parallel."""
        return [item.ids for item in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_measured(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """The ids of each text and, int64, how many of the text's UTF-8 bytes each token stands for.

        The byte counts add up to the text up to the end of the last token. A character that takes several tokens counts
        with the first of them; tokenizers that leave white space out of a token's extent count it with the next one.
        """
        measured = []
        items = self.backend.encode_batch(texts, add_special_tokens=False)
        for text, item in zip(texts, items, strict=True):
            points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
            ends = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
            token_ends = ends[[end for _, end in item.offsets]] if item.ids else ends[:0]
            measured.append((item.ids, np.diff(token_ends, prepend=0)))
        return measured

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.backend.decode(ids)
        return text

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` piece by piece, as they come; see `StreamDecoder`."""
        decoder = StreamDecoder(self)
        for token in ids:
            if piece := decoder.push(token):
                yield piece
        if piece := decoder.flush():
            yield piece


class StreamDecoder:
    """Decodes tokens one at a time and never gives out part of a character.

    The pieces joined are `decode` of all ids, for byte-level tokenizers with any ids, and continue the text before them
    (a tokenizer that drops a leading space drops none here).
    """

    # A UTF-8 character of which bytes are still to come shows as at most this many U+FFFD.
    _PENDING = 3

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoding after some text keeps the leading space that SentencePiece-like decoders strip from the first token.
        self._anchor = tokenizer.encode("a")
        self._skip = len(tokenizer.decode(self._anchor))
        self._ids: list[int] = []  # since the last point where a character was complete
        self._given = 0  # characters of their text already given out

    def push(self, token: int) -> str:
        """The text that `token` completes; often all of it, empty while a character is incomplete."""
        self._ids.append(token)
        text = self._text()
        settled = len(text)
        while settled > max(self._given, len(text) - self._PENDING) and text[settled - 1] == "\ufffd":
            settled -= 1
        piece = text[self._given : settled]
        self._given = settled
        if settled == len(text):
            self._ids, self._given = [], 0
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come."""
        piece = self._text()[self._given :]
        self._ids, self._given = [], 0
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(self._anchor + self._ids)[self._skip :]
