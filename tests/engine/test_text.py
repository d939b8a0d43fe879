"""Stop strings against a search character by character, with texts cut into tokens in any way."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from crosslayer.data import Tokenizer
from crosslayer.engine.text import TextStream

TOKENIZER = Tokenizer.train(["abab abba caba abcabc 😀 é " * 20], 290)


def until_stop(text: str, stop: list[str]) -> str:
    """Character by character: the text before the first stop string to be complete, the longest of several."""
    for end in range(len(text) + 1):
        if found := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, found))]
    return text


def could_begin(text: str, stop: list[str]) -> int:
    """Characters at the end of the text that a stop string may go on from."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text(alphabet="abc é😀", max_size=30),
    stop=st.lists(st.text(alphabet="abcé😀", min_size=1, max_size=5), max_size=3),
    bytewise=st.booleans(),
)
def test_what_is_given_out_ends_before_the_first_stop_string(text: str, stop: list[str], bytewise: bool) -> None:
    pieces = list(text) if bytewise else [text]
    ids = [token for piece in pieces for token in TOKENIZER.encode(piece)]
    stream, given = TextStream(TOKENIZER, stop), ""
    for number, token in enumerate(ids):
        given += stream.push(token, may_stop=True)
        if stream.stopped:
            break
        seen = TOKENIZER.decode(ids[: number + 1]).rstrip("\ufffd")
        # Nothing is held back but what may be the beginning of a stop string.
        assert given == seen[: len(seen) - could_begin(seen, stop)]
    given += stream.finish()
    assert given == until_stop(text, stop)
    assert stream.stopped == any(s in text for s in stop)


def test_stop_strings_count_only_when_they_may() -> None:
    stream = TextStream(TOKENIZER, ["ab", "caxx"])
    ids = [TOKENIZER.encode(c)[0] for c in "abcab"]
    assert "".join(stream.push(token, may_stop=False) for token in ids[:3]) == "ab"
    assert "".join(stream.push(token, may_stop=True) for token in ids[3:]) + stream.finish() == "c"
    assert stream.stopped


def test_half_a_character_at_the_end() -> None:
    stream = TextStream(TOKENIZER, ["\ufffd"])
    half = TOKENIZER.encode("☃")[:1]
    assert stream.push(half[0], may_stop=True) == ""
    assert stream.finish() == ""
    assert stream.stopped


def test_nothing_comes_after_a_stop_string() -> None:
    stream = TextStream(TOKENIZER, ["b"])
    given = [stream.push(token, may_stop=True) for token in (*TOKENIZER.encode("ab"), TOKENIZER.encode("☃")[0])]
    assert "".join(given) + stream.finish() == "a"
