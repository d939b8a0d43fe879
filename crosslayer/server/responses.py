"""What answers look like: OpenAI's objects, made from the engine's outputs, whole or piece by piece.

The TypedDicts are also what the OpenAPI description is made from.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from crosslayer.data import StreamDecoder, Tokenizer
from crosslayer.engine import Output, TokenLogprobs
from crosslayer.engine.request import FinishReason


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class ErrorBody(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    error: ErrorBody


# The characters that stand for bytes in the tokens of byte-level BPE: for a printable one of Latin-1 itself, for the
# others those from 256 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}


class Speller:
    """Tokens as text, one by one. Part of a character shows as U+FFFD, a special token by its name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend
        self._anchor = tokenizer.encode("a")  # keeps the leading space that some decoders strip
        self._skip = len(self._decode(self._anchor))
        self.spell = cache(self._spell)

    def _spell(self, token: int) -> str:
        return self._decode([*self._anchor, token])[self._skip :]

    def raw(self, token: int) -> bytes | None:
        """The bytes of its text; of a part of a character only where the tokenizer is byte-level BPE."""
        text = self.spell(token)
        if "\ufffd" not in text:
            return text.encode()
        name = self._backend.id_to_token(token) or ""
        raw = bytes(_BYTES[character] for character in name if character in _BYTES)
        return raw if raw.decode(errors="replace") == text else None

    def key(self, token: int) -> str:
        """As OpenAI's completions name it: a part of a character by its bytes, so that two of them differ."""
        raw = self.raw(token) if "\ufffd" in self.spell(token) else None
        return self.spell(token) if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text


class Choice:
    """One sample on its way to a client: its text and log-probabilities, so far or since they were last taken."""

    def __init__(self, speller: Speller, text: str = "") -> None:
        self._speller = speller
        self._text, self._offset = [text], len(text)
        self._decoder = StreamDecoder(speller.tokenizer)  # the engine's text stays behind while a stop may come
        self._tokens: list[tuple[int, int, TokenLogprobs]] = []  # where the token's text begins, and the token
        self.finish_reason: FinishReason | None = None

    def add(self, output: Output) -> None:
        self._text.append(output.text)
        if output.token is not None and output.logprobs is not None:
            piece = self._decoder.push(output.token)
            # The piece begins with what a character was waiting for, or with U+FFFD for one that was never finished.
            before = max(0, len(piece) - len(self._speller.spell(output.token)))
            self._tokens.append((self._offset + before, output.token, output.logprobs))
            self._offset += len(piece)
        self.finish_reason = output.finish_reason

    def take_text(self) -> str:
        text = "".join(self._text)
        self._text = []
        return text

    def take_completion_logprobs(self) -> CompletionLogprobs:
        """Of tokens that are spelt alike `top_logprobs` has the likeliest. The tokens of a character begin where it
        does."""
        taken, self._tokens = self._tokens, []
        key = self._speller.key
        return {
            "tokens": [key(token) for _, token, _ in taken],
            "token_logprobs": [item.logprob for _, _, item in taken],
            "top_logprobs": [{key(token): value for token, value in reversed(item.top)} for _, _, item in taken],
            "text_offset": [offset for offset, _, _ in taken],
        }

    def take_chat_logprobs(self) -> ChatLogprobs:
        taken, self._tokens = self._tokens, []
        return {
            "content": [
                {**self._top(token, item.logprob), "top_logprobs": [self._top(*pair) for pair in item.top]}
                for _, token, item in taken
            ]
        }

    def _top(self, token: int, logprob: float) -> TopLogprob:
        raw = self._speller.raw(token)
        return {"token": self._speller.spell(token), "logprob": logprob, "bytes": None if raw is None else [*raw]}


class CompletionFormat:
    """How /v1/completions says it."""

    id_prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"

    @staticmethod
    def begin(index: int) -> dict[str, Any] | None:
        """A first chunk of a choice, before anything is generated."""
        return None

    @staticmethod
    def whole(index: int, choice: Choice, logprobs: bool) -> CompletionChoice:
        return {
            "index": index,
            "text": choice.take_text(),
            "logprobs": choice.take_completion_logprobs() if logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    piece = whole


class ChatFormat:
    """How /v1/chat/completions says it."""

    id_prefix, name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def begin(index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    @staticmethod
    def whole(index: int, choice: Choice, logprobs: bool) -> ChatChoice:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.take_text()},
            "logprobs": choice.take_chat_logprobs() if logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    @staticmethod
    def piece(index: int, choice: Choice, logprobs: bool) -> dict[str, Any]:
        text = choice.take_text()
        return {
            "index": index,
            "delta": {"content": text} if text else {},
            "logprobs": choice.take_chat_logprobs() if logprobs else None,
            "finish_reason": choice.finish_reason,
        }


Format = type[CompletionFormat] | type[ChatFormat]
