"""Tokenizers: nothing is lost, training is reproducible, streaming never shows part of a character."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from crosslayer.data import Tokenizer
from crosslayer.errors import UserError

TRAINING = [
    "def run(self, x):\n    return self.value + x  # a comment\n\n" * 20,
    "The café sells naïve crêpes; 世界 says 😀👩‍👩‍👧 and \t tabs.\r\n" * 20,
]
TOKENIZER = Tokenizer.train(TRAINING, 320)
# Pieces that are hard on tokenizers, next to any text.
any_text = st.lists(
    st.one_of(
        st.text(),
        st.sampled_from(
            ["<|endoftext|>", "<|endof", "    ", "\n\n\n", "\r\n", "\t", "self.value", "é", "😀", "👩‍👩‍👧", "\x00"]
        ),
    )
).map("".join)


@given(any_text)
def test_text_survives_encoding(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.eos_id not in ids  # its name in a text is text
    assert all(0 <= token < TOKENIZER.vocab_size for token in ids)
    assert "".join(TOKENIZER.decode_stream(ids)) == text


@given(any_text)
def test_measured_encoding_accounts_for_every_byte(text: str) -> None:
    [(ids, widths)] = TOKENIZER.encode_measured([text])
    assert ids == TOKENIZER.encode(text) == TOKENIZER.encode_batch([text])[0]
    assert len(widths) == len(ids)
    assert widths.sum() == len(text.encode())
    assert (widths >= 0).all()
    # A byte-level token is spelt with one character a byte: up to characters in parts, that is its width.
    spelt = np.cumsum([len(TOKENIZER.backend.id_to_token(token)) for token in ids])
    assert (np.abs(np.cumsum(widths) - spelt) <= 3).all()
    if text.isascii():
        assert (np.cumsum(widths) == spelt).all()


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40))
def test_streaming_equals_decoding_for_any_ids(ids: list[int]) -> None:
    """Also where the ids spell no valid UTF-8, as an untrained model's do."""
    assert "".join(TOKENIZER.decode_stream(ids)) == TOKENIZER.decode(ids)


def test_streaming_gives_whole_characters_as_soon_as_they_are_complete() -> None:
    text = "a😀é世b"
    pieces: list[str] = []
    alone = Tokenizer.train([], 257)  # one token a byte
    for count in range(1, len(text.encode()) + 1):
        pieces = list(alone.decode_stream(alone.encode(text)[:count]))
        complete = text.encode()[:count].decode(errors="ignore")
        assert "".join(pieces).removesuffix("\ufffd") == complete
    assert pieces == list(text)


def sentencepiece_like(**changes: Any) -> tokenizers.Tokenizer:
    """Marks spaces with ▁, puts one before a text, falls back to bytes: as Llama 2 and Mistral do."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁b", "ab", "▁ab"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab")]
    backend = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>", **changes)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return backend


@given(st.text(alphabet="ab é😀世", max_size=20))
def test_a_tokenizer_with_byte_fallback_measures_and_streams(text: str) -> None:
    tokenizer = Tokenizer(sentencepiece_like(), "</s>")
    [(ids, widths)] = tokenizer.encode_measured([text])
    assert widths.sum() == len(text.encode())
    assert tokenizer.decode(ids) == text
    # In a stream the text continues what came before, so the leading space stays.
    assert "".join(tokenizer.decode_stream(ids)) == (" " + text if text else "")


def test_training_is_reproducible_and_saved_whole(tmp_path: Path) -> None:
    again = Tokenizer.train(iter(TRAINING), 320)
    assert again.backend.to_str() == TOKENIZER.backend.to_str()
    assert (again.vocab_size, again.eos_token, again.eos_id) == (320, "<|endoftext|>", 0)
    again.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.encode(TRAINING[1]) == TOKENIZER.encode(TRAINING[1])
        assert loaded.eos_id == 0


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == TOKENIZER.eos_id
    assert theirs(TRAINING[1])["input_ids"] == TOKENIZER.encode(TRAINING[1])
    assert theirs.decode(TOKENIZER.encode(TRAINING[1])) == TRAINING[1]


def test_the_end_of_text_token_of_an_existing_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    sentencepiece_like().save(str(file))
    assert Tokenizer.load(file).eos_token == "</s>"
    assert Tokenizer.load(file, "<unk>").eos_id == 0
    with pytest.raises(UserError, match="no token '<stop>'"):
        Tokenizer.load(file, "<stop>")
    # The folder's config decides before the usual names, and survives saving.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "ab"}, "chat_template": "t"}))
    loaded = Tokenizer.load(file)
    assert loaded.eos_token == "ab"
    loaded.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"eos_token": "ab", "chat_template": "t"}


def test_settings_that_would_change_training_text_are_switched_off(tmp_path: Path) -> None:
    backend = sentencepiece_like()
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    expected = [tokenizer.backend.token_to_id(token) for token in ("▁a", "▁a", "▁a", "▁a", "▁a")]
    assert tokenizer.encode("a a a a a") == tokenizer.encode_batch(["a a a a a"])[0] == expected


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone/tokenizer\.json cannot be read|gone cannot be read"):
        Tokenizer.load(tmp_path / "gone")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-text token that is known by name; name it with eos_token"):
        Tokenizer.load(tmp_path)
    for config, message in {
        "[]": "want a JSON object",
        "{": "not JSON",
        '{"eos_token": 3}': "eos_token must be text, got 3",
        '{"eos_token": {"content": ["a"]}}': r"eos_token must be text, got \['a'\]",
    }.items():
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(UserError, match=rf"tokenizer_config\.json: {message}"):
            Tokenizer.load(tmp_path)
