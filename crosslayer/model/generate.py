"""Continuing prompts, a batch at a time, from the contiguous cache."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslayer.errors import UserError
from crosslayer.model.cache import ContiguousCache
from crosslayer.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest; `top_k` 0 and `top_p` 1 leave all tokens in.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must not be negative (0 keeps every token), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie above 0 and at most at 1, got {self.top_p}")


GREEDY = Sampling()


def make_cache(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> ContiguousCache:
    """A cache that `generate` fits into: a row a prompt, long enough for the longest and its continuation."""
    weight = model.lm_head.weight
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    return ContiguousCache(model.config, len(prompts), longest, dtype=weight.dtype, device=weight.device)


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    cache: ContiguousCache | None = None,
) -> Iterator[list[int | None]]:
    """Continue each prompt (token ids) and yield, step by step, one token a row, None for rows that have ended.

    A row ends after `max_new_tokens` or with an end-of-text token of the model's config, which is not given out. What
    a row gets does not depend on the rows beside it; with sampling, each row draws from a generator of its own, seeded
    by the seed and the row's number. `cache` (from `make_cache`) may be passed to look at it; it must be empty.

    Raises:
        UserError: no prompt, or an empty one.
    """
    if not prompts or not all(prompts):
        raise UserError("there is nothing to continue: a prompt has no tokens")
    device = model.lm_head.weight.device
    cache = make_cache(model, prompts, max_new_tokens) if cache is None else cache
    stop = set(model.config.eos_token_ids)
    # A hash, because seed + row would give row 1 of one seed the numbers of row 0 of the next.
    seeds = [zlib.crc32(f"{sampling.seed} {row}".encode()) for row in range(len(prompts))]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    model.eval()

    new_lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(new_lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    for _ in range(max_new_tokens):
        hidden = model.model(ids.to(device), cache=cache, new_lengths=new_lengths)
        last = hidden[torch.arange(len(prompts)), (new_lengths - 1).clamp(min=0).to(device)]
        drawn = sample(model.lm_head(last), sampling, generators).tolist()
        running = [
            bool(length) and token not in stop for token, length in zip(drawn, new_lengths.tolist(), strict=True)
        ]
        if not any(running):
            return
        yield [token if runs else None for token, runs in zip(drawn, running, strict=True)]
        ids, new_lengths = torch.tensor(drawn)[:, None], torch.tensor(running).long()


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one token a row: logits [B, V] to int64 [B], with a generator (CPU) a row.

    The `top_k` likeliest tokens stay, of equal ones those with the lower id; of these the likeliest that together
    reach `top_p`.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    # The largest score is 0, so that a very low temperature does not overflow.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            ordered[:, sampling.top_k :] = -torch.inf
        if sampling.top_p < 1:
            probabilities = ordered.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            ordered[before >= sampling.top_p] = -torch.inf  # the token that crosses the threshold stays
        scores = scores.scatter(-1, order, ordered)
    # The exponential race: argmax of p / e, with e ~ Exp(1), falls on each token with probability p.
    race = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=g) for g in generators])
    return (scores.softmax(dim=-1) / race.to(scores.device)).argmax(dim=-1)
