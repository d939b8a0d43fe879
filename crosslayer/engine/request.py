"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from crosslayer.engine.text import TextStream
from crosslayer.errors import UserError
from crosslayer.model.paged import BlockTable

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How a prompt is continued. The defaults are greedy and go on to the end of text or of the context.

    Drawing: `temperature` 0 takes the likeliest token. Otherwise the `top_k` likeliest stay (0: all), of these the
    likeliest that together reach `top_p`, and of these the ones at least `min_p` times as likely as the likeliest.
    What is drawn depends on the `seed`, the number of the sample and the position only (None: a seed of chance).

    Penalties act on the logits first: tokens in prompt or output are divided by `repetition_penalty` (multiplied where
    negative); those in the output lose `presence_penalty`, and `frequency_penalty` for each time they occurred.

    Ending: after `max_tokens`; with the model's end-of-text token (unless `ignore_eos`) or one of `stop_token_ids`,
    which are not given out; or where the text contains one of the strings in `stop`, which is not given out either.
    None of the last three happens within the first `min_tokens`.

    `n` samples are drawn per prompt. With `logprobs` k, each token comes with its log-probability and those of the k
    likeliest tokens, by the model's own distribution before penalties and temperature.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "seed", "max_tokens", "min_tokens", "n", "logprobs"):
            value = getattr(self, name)
            if type(value) is not int and value is not getattr(SamplingParams, name):
                raise UserError(f"{name} must be a whole number, got {value!r}")
        limit = "(None: no limit but the context)"
        rules: tuple[tuple[str, bool, str], ...] = (
            ("temperature", 0 <= self.temperature < math.inf, "not be negative, nor infinite"),
            ("top_k", self.top_k >= 0, "not be negative (0 keeps every token)"),
            ("top_p", 0 < self.top_p <= 1, "lie above 0 and at most at 1"),
            ("min_p", 0 <= self.min_p <= 1, "lie between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "be positive (1 changes nothing)"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "be a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "be a number"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, f"be positive {limit}"),
            ("min_tokens", self.min_tokens >= 0, "not be negative"),
            ("stop", _all(self.stop, str) and all(self.stop), "be a tuple of texts, none of them empty"),
            ("stop_token_ids", _all(self.stop_token_ids, int), "be a tuple of token ids"),
            ("n", self.n >= 1, "be positive"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "not be negative (None: no log-probabilities)"),
        )
        for name, valid, rule in rules:
            if not valid:
                raise UserError(f"{name} must {rule}, got {getattr(self, name)!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}")

    @cached_property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        return not (self.temperature or self.has_penalties or self.min_tokens or self.logprobs is not None)


def _all(values: object, kind: type) -> bool:
    return isinstance(values, (tuple, list)) and all(isinstance(value, kind) for value in values)


@dataclass(frozen=True)
class Request:
    """A prompt (token ids) to be continued; `id` is the caller's name for it, unique among those in the engine."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of a token that was drawn, and of the likeliest ones, the most likely first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)  # not frozen: there is one for each token, and that would make it three times as slow
class Output:
    """What one step adds to sample `index` of a request.

    `token` is None where the sample ended with a token that is not given out, or was aborted. `text` is what became
    certain with the step: it may lag behind the tokens, and is complete when the sample ends, unless by an abort.
    `num_prefix` prompt tokens were found in the cache instead of computed.
    """

    request_id: str
    index: int
    token: int | None
    text: str
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    num_prefix: int = 0


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request on its way: its tokens, how many of them are in the cache, and in which blocks.

    `tokens` are the prompt's and those drawn so far, `limit` is how many there may be; `text` is None in an engine
    without a tokenizer. `num_pending` more tokens are drawn by steps that were launched, but not known here yet.

    While it runs it has a `slot` of its own, below `max_running`, in which the device keeps the token it drew last; -1
    while it waits and when it has ended. `num_cached` tokens are in the cache once the steps launched are done.
    `num_prefix` tokens of the prompt were in the cache when the sequence first came to run (None: it has not).

    `blocks` looks after the rest: `tables` hold blocks by span, with room for the first `room` tokens, and from
    `trim_at` tokens in the cache on one of them is behind its window; `digests` name the contents of full blocks.
    """

    request: Request
    index: int
    seed: int
    limit: int
    stop_ids: frozenset[int]
    text: TextStream | None
    tokens: list[int]
    num_pending: int = 0
    slot: int = -1
    ended: bool = False
    num_cached: int = 0
    num_prefix: int | None = None
    tables: dict[int, BlockTable] = field(default_factory=dict)
    room: int = 0
    trim_at: int = 0
    digests: list[bytes] = field(default_factory=list)

    @property
    def num_output(self) -> int:
        """Tokens drawn and known."""
        return len(self.tokens) - len(self.request.prompt)
