"""Text from tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from crosslayer.data import StreamDecoder, Tokenizer


class TextStream:
    """The text of one sample. What may turn out to be the beginning of a stop string is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int, *, may_stop: bool) -> str:
        """The text that becomes certain with a token; with `may_stop`, a stop string ends it: see `stopped`."""
        return self._release(self._decoder.push(token), may_stop)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.flush(), may_stop=True) + self._held
        self._held = ""
        return text

    def _release(self, piece: str, may_stop: bool) -> str:
        if not self._stop:
            return piece
        text = self._held + piece
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found and may_stop:
            self.stopped, self._held = True, ""
            _, start = min(found)  # the one that was complete first, so that it does not matter how tokens cut the text
            return text[:start]
        # Held back from the first place on where what follows is the beginning of a stop string, and not all of it.
        longest = max(len(stop) - 1 for stop in self._stop)
        start = next(
            (
                place
                for place in range(max(0, len(text) - longest), len(text))
                if any(stop != text[place:] and stop.startswith(text[place:]) for stop in self._stop)
            ),
            len(text),
        )
        self._held = text[start:]
        return text[:start]
