"""Log-probabilities of given tokens after given tokens, in batches: what tasks, recall and documents are scored by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crosslayer.errors import UserError
from crosslayer.model import Transformer

# Sequences are padded to a power of two from here up, so that a GPU meets few shapes.
_SHORTEST = 16
_LOGITS_AT_A_TIME = 2**24


@dataclass(frozen=True)
class Request:
    """Score the tokens `ids[start:]`, each given all before it; `start` is at least 1."""

    ids: Sequence[int]
    start: int


@dataclass(frozen=True)
class Scored:
    """For each token of a request that was scored: its log-probability in nats (float64) and whether it was the
    likeliest of all."""

    log_probs: np.ndarray
    greedy: np.ndarray


@torch.inference_mode()
def score_requests(
    model: Transformer,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 2**14,
    progress: Callable[[int, int], None] | None = None,
) -> list[Scored]:
    """Score every request by itself, some `batch_tokens` tokens at a time.

    Requests that are longer than the model's context lose their first tokens. The hidden states are computed in the
    model's own precision, or in autocast where the caller enables it; logits in at least float32. `progress` is called
    with requests scored and requests to score, first with 0.

    Raises:
        UserError: more tokens are to be scored than the context holds.
    """
    context = model.config.max_position_embeddings
    fitted = [_fit(request, context) for request in requests]
    longest_first = sorted(range(len(fitted)), key=lambda number: -len(fitted[number].ids))
    device = model.lm_head.weight.device
    weight = model.lm_head.weight.to(torch.promote_types(model.lm_head.weight.dtype, torch.float32))
    was_training = model.training
    model.eval()
    results: dict[int, Scored] = {}
    if progress is not None:
        progress(0, len(fitted))
    while len(results) < len(fitted):
        first = len(results)
        width = min(max(_SHORTEST, _power_of_two(len(fitted[longest_first[first]].ids) - 1)), context)
        batch = longest_first[first : first + max(1, batch_tokens // width)]
        log_probs, greedy = _score_batch(model, weight, [fitted[number] for number in batch], width, device)
        ends = np.cumsum([len(fitted[number].ids) - fitted[number].start for number in batch])[:-1]
        for number, *scored in zip(batch, np.split(log_probs, ends), np.split(greedy, ends), strict=True):
            results[number] = Scored(*scored)
        if progress is not None:
            progress(len(results), len(fitted))
    model.train(was_training)
    return [results[number] for number in range(len(fitted))]


def _fit(request: Request, context: int) -> Request:
    """The last `context` + 1 tokens: the last of them is scored and not read."""
    dropped = len(request.ids) - (context + 1)
    if dropped <= 0:
        return request
    if dropped >= request.start:
        raise UserError(
            f"{len(request.ids) - request.start} tokens are to be scored at once, but the model's context is {context}"
        )
    return Request(request.ids[dropped:], request.start - dropped)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _score_batch(
    model: Transformer, weight: Tensor, requests: Sequence[Request], width: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and greedy flags of all scored tokens, request after request."""
    inputs = np.zeros((len(requests), width), dtype=np.int64)  # what pads a row on the right is not seen by the rest
    for row, request in zip(inputs, requests, strict=True):
        row[: len(request.ids) - 1] = request.ids[:-1]
    rows = np.concatenate([np.full(len(r.ids) - r.start, i) for i, r in enumerate(requests)])
    columns = np.concatenate([np.arange(r.start, len(r.ids)) - 1 for r in requests])
    targets = torch.tensor([token for r in requests for token in r.ids[r.start :]], device=device)
    hidden = model.model(torch.from_numpy(inputs).to(device))
    hidden = hidden[torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)]
    log_probs, greedy = [], []
    with torch.autocast(device.type, enabled=False):
        chunk = max(1, _LOGITS_AT_A_TIME // weight.shape[0])
        for start in range(0, len(targets), chunk):
            wanted = targets[start : start + chunk]
            logits = hidden[start : start + chunk].to(weight.dtype) @ weight.T
            found = logits.gather(1, wanted[:, None]).squeeze(1)
            log_probs.append(found - logits.logsumexp(dim=1))
            greedy.append(logits.argmax(dim=1) == wanted)
    return torch.cat(log_probs).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()
