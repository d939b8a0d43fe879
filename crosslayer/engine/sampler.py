"""Drawing the next token of every sequence of a batch at once, on the device of the logits.

A draw is the inverse of the cumulated probabilities at a uniform number that follows from seed, sample and position
alone. So there is no generator whose state would have to survive preemption, and no row depends on the rows beside it.

Nothing in `draw` waits for a GPU: what rows ask for goes there by copies that are not waited for, and what was drawn
comes back in `Draws` the same way, while the next step is computed.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from hashlib import blake2b
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from crosslayer.engine.request import Sequence, TokenLogprobs

# Settings beyond this, or less than one part of it, count as that: infinity times nothing would be no number.
MOST = 1e30


class RowLogprobs(NamedTuple):
    """On the device, for L rows: log-probabilities of their tokens, `drawn` [L], and of the K likeliest, `values` and
    `ids` [L, K]. `counts`: how many of these each row of the batch asked for (None: no log-probabilities)."""

    counts: list[int | None]
    drawn: Tensor
    values: Tensor
    ids: Tensor


class Drawn(NamedTuple):
    """What was drawn, on the device: int64 tokens [R]."""

    tokens: Tensor
    logprobs: RowLogprobs | None = None


class OnHost(NamedTuple):
    """Tokens in the host's memory, once the event is over (None: they are there)."""

    tokens: Tensor
    event: torch.cuda.Event | None


class Draws:
    """What was drawn, on its way to the host; log-probabilities are there when the tokens are."""

    def __init__(self, tokens: OnHost, logprobs: RowLogprobs | None = None) -> None:
        self._tokens, self._event = tokens
        self._logprobs = logprobs

    @classmethod
    def of(cls, drawn: Drawn) -> Draws:
        """By copies that are not waited for."""
        tokens, logprobs = _to_host(drawn.tokens), None
        if drawn.logprobs is not None:
            counts, *tensors = drawn.logprobs
            logprobs = RowLogprobs(counts, *map(_to_host, tensors))
        event = torch.cuda.Event() if drawn.tokens.is_cuda else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record(torch.cuda.current_stream(drawn.tokens.device))
        return cls(OnHost(tokens, event), logprobs)

    def result(self) -> list[tuple[int, TokenLogprobs | None]]:
        """Token and, where they were asked for, log-probabilities of each row; waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        tokens = self._tokens.tolist()
        return list(zip(tokens, repeat(None) if self._logprobs is None else _by_row(self._logprobs), strict=False))


def draw(logits: Tensor, rows: Rows[Sequence]) -> Drawn:
    """The next token of each row, from logits [R, vocab_size], and its log-probabilities where they are asked for."""
    raw = logits.float()
    scores = _forbid_early_stops(_penalise(raw, rows), rows)
    tokens = scores.argmax(dim=-1)
    if any(row.request.params.temperature for row in rows):
        tokens = _draw_at_random(scores, tokens, rows)
    return Drawn(tokens, _logprobs(raw, tokens, rows))


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) that is as good as random, always the same for the same arguments."""
    digest = blake2b(f"{seed} {sample} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 12) / 2**52  # 52 bits: the float is exact and below 1


def _to_host(tensor: Tensor) -> Tensor:
    # From a GPU into pinned memory. Other devices have no event that says when it is there.
    return tensor.to("cpu", non_blocking=tensor.is_cuda)


def _to_device(values: Rows[object], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _draw_at_random(scores: Tensor, likeliest: Tensor, rows: Rows[Sequence]) -> Tensor:
    """A token [R] of what temperature, top_k, top_p and min_p leave; with temperature 0 the likeliest."""
    vocabulary = scores.shape[-1]
    settings = [
        (
            p.temperature,
            p.top_k or vocabulary,
            max(p.top_p, 1 / MOST) if p.top_p < 1 else 2.0,  # 2: beyond any rounding
            p.min_p,
            uniform(row.seed, row.index, row.num_output + row.num_pending) if p.temperature else 0.0,
        )
        for row in rows
        for p in (row.request.params,)
    ]
    columns = _to_device(settings, scores.device, torch.float64)[:, :, None]  # one copy for all
    temperature, top_k, top_p, min_p, number = columns.unbind(1)
    # The largest score is 0, so that a very low temperature does not overflow.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature.clamp(min=1e-30).float()
    if any(row.request.params.top_k or row.request.params.top_p < 1 for row in rows):
        scores = _truncate(scores, top_k, top_p.float())
    probabilities = scores.softmax(dim=-1)
    if any(row.request.params.min_p for row in rows):
        least = min_p.float() * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    # In float64, where neither a long tail nor the last token is lost to rounding.
    cumulated = probabilities.double().cumsum(dim=-1)
    drawn = torch.searchsorted(cumulated, number * cumulated[:, -1:], right=True)[:, 0].clamp(max=vocabulary - 1)
    return torch.where(temperature[:, 0] > 0, drawn, likeliest)


def _truncate(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Leave the `top_k` [R, 1] likeliest tokens, of equal ones those with the lower id; of these the likeliest that
    together reach `top_p` [R, 1]."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(scores.shape[-1], device=scores.device) >= top_k, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)  # the token that crosses the threshold stays
    return scores.scatter(-1, order, ordered)


def _penalise(logits: Tensor, rows: Rows[Sequence]) -> Tensor:
    """Logits after the penalties of the rows that have any, all of whose tokens must be known."""
    chosen = [number for number, row in enumerate(rows) if row.request.params.has_penalties]
    if not chosen:
        return logits
    affected, device = [rows[number] for number in chosen], logits.device
    settings = [
        (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        for p in (row.request.params for row in affected)
    ]
    columns = _to_device(settings, device, torch.float32).clamp(-MOST, MOST)
    repetition, presence, frequency = columns[:, :, None].unbind(1)
    repetition = repetition.clamp(min=1 / MOST)
    counts = _counts([row.tokens[len(row.request.prompt) :] for row in affected], logits)
    seen = _counts([row.tokens for row in affected], logits) > 0
    index = _to_device(chosen, device)
    some = logits[index]
    some = torch.where(seen, torch.where(some > 0, some / repetition, some * repetition), some)
    some = some - frequency * counts - presence * (counts > 0)
    return logits.index_copy(0, index, some)


def _counts(tokens: list[list[int]], logits: Tensor) -> Tensor:
    """How often each token occurs in each row, float32 [R, vocab_size]."""
    counts = torch.zeros(len(tokens), logits.shape[-1], device=logits.device)
    numbers = [number for number, row in enumerate(tokens) for _ in row]
    places = _to_device([numbers, [token for row in tokens for token in row]], logits.device)
    ones = torch.ones(len(numbers), device=logits.device)
    return counts.index_put_(places.unbind(0), ones, accumulate=True)


def _forbid_early_stops(scores: Tensor, rows: Rows[Sequence]) -> Tensor:
    """No stop token is drawn before a row has its `min_tokens`."""
    pairs = [
        (number, token)
        for number, row in enumerate(rows)
        if row.num_output + row.num_pending < row.request.params.min_tokens
        for token in row.stop_ids
    ]
    if not pairs:
        return scores
    places = _to_device(pairs, scores.device).unbind(1)
    return scores.index_put(places, scores.new_full((), -torch.inf))


def _logprobs(logits: Tensor, tokens: Tensor, rows: Rows[Sequence]) -> RowLogprobs | None:
    counts = [row.request.params.logprobs for row in rows]
    chosen = [number for number, count in enumerate(counts) if count is not None]
    if not chosen:
        return None
    index = _to_device(chosen, logits.device)
    logprobs = logits[index].log_softmax(dim=-1)
    drawn = logprobs.gather(-1, tokens[index, None])[:, 0]
    most = min(max(count or 0 for count in counts), logits.shape[-1])
    return RowLogprobs(counts, drawn, *logprobs.topk(most, dim=-1))


def _by_row(logprobs: RowLogprobs) -> list[TokenLogprobs | None]:
    """Of each row of the batch, from tensors on the host."""
    likeliest = zip(*(tensor.tolist() for tensor in logprobs[1:]), strict=True)  # of those that asked
    result: list[TokenLogprobs | None] = []
    for count in logprobs.counts:
        if count is None:
            result.append(None)
        else:
            drawn, values, ids = next(likeliest)
            result.append(TokenLogprobs(drawn, tuple(zip(ids[:count], values[:count], strict=True))))
    return result
