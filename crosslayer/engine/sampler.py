"""Drawing the next token of every sequence of a batch at once, on the device of the logits.

A draw is the inverse of the cumulated probabilities at a uniform number that follows from seed, sample and position
alone. So there is no generator whose state would have to survive preemption, and no row depends on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from crosslayer.engine.request import SamplingParams, Sequence, TokenLogprobs


def draw(logits: Tensor, rows: list[Sequence]) -> list[tuple[int, TokenLogprobs | None]]:
    """The next token of each row, from logits [R, vocab_size], and its log-probabilities where they are asked for."""
    raw = logits.float()
    scores = _forbid_early_stops(_penalise(raw, rows), rows)
    tokens = scores.argmax(dim=-1)
    if any(row.request.params.temperature for row in rows):
        at_random = _column(rows, lambda p: p.temperature > 0, logits.device)
        tokens = torch.where(at_random, _draw_at_random(scores, rows), tokens)
    return list(zip(tokens.tolist(), _logprobs(raw, tokens, rows), strict=True))


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) that is as good as random, always the same for the same arguments."""
    digest = blake2b(f"{seed} {sample} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 12) / 2**52  # 52 bits: the float is exact and below 1


def _column(rows: list[Sequence], value: Callable[[SamplingParams], float], device: torch.device) -> Tensor:
    """A value per row, as [R]."""
    return torch.tensor([value(row.request.params) for row in rows], device=device)


def _draw_at_random(scores: Tensor, rows: list[Sequence]) -> Tensor:
    """Temperature, top_k, top_p, min_p, and a token [R] of what they leave; rows with temperature 0 get any token."""
    device = scores.device
    temperature = _column(rows, lambda p: max(p.temperature, 1e-30), device)[:, None]
    # The largest score is 0, so that a very low temperature does not overflow.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    if any(row.request.params.top_k or row.request.params.top_p < 1 for row in rows):
        scores = _truncate(scores, rows)
    probabilities = scores.softmax(dim=-1)
    if any(row.request.params.min_p for row in rows):
        least = _column(rows, lambda p: p.min_p, device)[:, None] * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    # In float64, where neither a long tail nor the last token is lost to rounding.
    cumulated = probabilities.double().cumsum(dim=-1)
    numbers = [uniform(row.seed, row.index, row.num_output) for row in rows]
    targets = torch.tensor(numbers, dtype=torch.float64, device=device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, targets, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)


def _truncate(scores: Tensor, rows: list[Sequence]) -> Tensor:
    """Leave the `top_k` likeliest tokens, of equal ones those with the lower id; of these the likeliest that together
    reach `top_p`."""
    vocabulary = scores.shape[-1]
    top_k = _column(rows, lambda p: p.top_k or vocabulary, scores.device)[:, None]
    top_p = _column(rows, lambda p: p.top_p if p.top_p < 1 else 2.0, scores.device)[:, None]  # 2: beyond any rounding
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(vocabulary, device=scores.device) >= top_k, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)  # the token that crosses the threshold stays
    return scores.scatter(-1, order, ordered)


def _penalise(logits: Tensor, rows: list[Sequence]) -> Tensor:
    """Logits after the penalties of the rows that have any."""
    chosen = [number for number, row in enumerate(rows) if row.request.params.has_penalties]
    if not chosen:
        return logits
    affected, device = [rows[number] for number in chosen], logits.device
    repetition = _column(affected, lambda p: p.repetition_penalty, device)[:, None]
    presence = _column(affected, lambda p: p.presence_penalty, device)[:, None]
    frequency = _column(affected, lambda p: p.frequency_penalty, device)[:, None]
    counts = _counts([row.tokens[len(row.request.prompt) :] for row in affected], logits)
    seen = _counts([row.tokens for row in affected], logits) > 0
    index = torch.tensor(chosen, device=device)
    some = logits[index]
    some = torch.where(seen, torch.where(some > 0, some / repetition, some * repetition), some)
    some = some - frequency * counts - presence * (counts > 0)
    return logits.index_copy(0, index, some)


def _counts(tokens: list[list[int]], logits: Tensor) -> Tensor:
    """How often each token occurs in each row, float32 [R, vocab_size]."""
    counts = torch.zeros(len(tokens), logits.shape[-1], device=logits.device)
    numbers = [number for number, row in enumerate(tokens) for _ in row]
    places = (torch.tensor(numbers, dtype=torch.int64), torch.tensor([t for row in tokens for t in row]).long())
    ones = torch.ones(len(numbers), device=logits.device)
    return counts.index_put_(tuple(place.to(logits.device) for place in places), ones, accumulate=True)


def _forbid_early_stops(scores: Tensor, rows: list[Sequence]) -> Tensor:
    """No stop token is drawn before a row has its `min_tokens`."""
    pairs = [
        (number, token)
        for number, row in enumerate(rows)
        if row.num_output < row.request.params.min_tokens
        for token in row.stop_ids
    ]
    if not pairs:
        return scores
    numbers, tokens = torch.tensor(pairs, device=scores.device).unbind(1)
    return scores.index_put((numbers, tokens), scores.new_tensor(-torch.inf))


def _logprobs(logits: Tensor, tokens: Tensor, rows: list[Sequence]) -> list[TokenLogprobs | None]:
    chosen = [number for number, row in enumerate(rows) if row.request.params.logprobs is not None]
    result: list[TokenLogprobs | None] = [None] * len(rows)
    if chosen:
        index = torch.tensor(chosen, device=logits.device)
        logprobs = logits[index].log_softmax(dim=-1)
        drawn = logprobs.gather(-1, tokens[index, None])[:, 0].tolist()
        most = min(max(rows[number].request.params.logprobs or 0 for number in chosen), logits.shape[-1])
        values, ids = (part.tolist() for part in logprobs.topk(most, dim=-1))
        for place, number in enumerate(chosen):
            top = list(zip(ids[place], values[place], strict=True))[: rows[number].request.params.logprobs]
            result[number] = TokenLogprobs(drawn[place], tuple(top))
    return result


class Draws:
    def __init__(self, logits, rows):
        self._r = draw(logits, rows)
        self.tokens = torch.tensor([t for t, _ in self._r], dtype=torch.int64)

    def result(self):
        return self._r
