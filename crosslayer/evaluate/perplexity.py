"""How well a model predicts held-out text: loss, perplexity and bits per byte over windows of a token stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from crosslayer.data import TokenStream
from crosslayer.errors import UserError
from crosslayer.evaluate.likelihood import Request, score_requests
from crosslayer.model import Transformer


@dataclass(frozen=True)
class Score:
    """Total loss (nats) over `tokens` predicted tokens that stand for `num_bytes` bytes of text."""

    total_loss: float
    tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.total_loss / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers: loss in bits over bytes of text."""
        return self.total_loss / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def to_dict(self) -> dict[str, float | int]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
        }


@torch.no_grad()  # not inference_mode: sharded weights that are gathered in it could not be trained with afterwards
def score(
    model: Transformer,
    stream: TokenStream,
    *,
    sequence_length: int,
    stride: int | None = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    mask_documents_at: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Score:
    """Score every token of a stream but the first, each once.

    Windows of `sequence_length` tokens start every `stride` tokens (default: `sequence_length`, disjoint windows). A
    window after the first scores only the tokens that no earlier one has, so a smaller stride gives each token more
    context and takes longer. `max_tokens` stops early. With `mask_documents_at`, the end-of-text id, tokens see
    only their own document, as in training with packed documents.

    Runs in the model's own precision, or in autocast where the caller enables it. `progress` is called with tokens
    scored and tokens to score. The processes of a `group` take turns with the batches, and all get the same score.

    Raises:
        UserError: fewer than two tokens, or a stride outside 1 to `sequence_length`.
    """
    stride = sequence_length if stride is None else stride
    if len(stream) < 2:
        raise UserError(f"the text has {len(stream)} tokens; at least 2 are needed to score a prediction")
    if not 1 <= stride <= sequence_length:
        raise UserError(f"stride must lie between 1 and the window length {sequence_length}, got {stride}")
    device = next(model.parameters()).device
    rank, turns = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    was_training = model.training
    model.eval()
    total_loss, tokens, num_bytes = 0.0, 0, 0
    limit = len(stream) - 1 if max_tokens is None else min(max_tokens, len(stream) - 1)
    for number, batch in enumerate(_batches(stream, sequence_length, stride, batch_size, limit)):
        inputs, targets, scored, text_bytes = batch
        tokens += int(scored.sum())
        num_bytes += text_bytes
        # A sharded model runs on all processes at once, so in the last round those left over score nothing of it.
        if number % turns == rank or (tokens == limit and rank > number % turns):
            scored &= number % turns == rank
            ids = torch.from_numpy(inputs).to(device)
            wanted = torch.from_numpy(np.where(scored, targets, -1)).to(device)
            total_loss += model(ids, wanted, document_ids=_document_ids(ids, mask_documents_at)).item()
        if progress is not None:
            progress(tokens, limit)
    if group is not None:
        total = torch.tensor(total_loss, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=group)
        total_loss = total.item()
    model.train(was_training)
    return Score(total_loss, tokens, num_bytes)


def document_losses(
    model: Transformer, stream: TokenStream, *, sequence_length: int, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Loss in nats and number of tokens of each document of a stream, float64 and int64 [documents], every token scored
    as `score` does it in disjoint windows. A document's end-of-text token is its last. Their `ratio_and_error` is the
    mean loss, and how far it may be from that of all such documents.
    """
    limit = len(stream) - 1
    starts = range(0, limit, sequence_length)
    windows = (stream.read(start, min(start + sequence_length, limit) + 1).tolist() for start in starts)
    scored = score_requests(model, [Request(window, 1) for window in windows])
    losses = -np.concatenate([result.log_probs for result in scored])
    ended = stream.read(0, limit + 1) == eos_id
    # The first token is read and never scored; it counts for nothing.
    documents = (np.cumsum(ended) - ended)[1:]
    return np.bincount(documents, weights=losses), np.bincount(documents)


def _batches(
    stream: TokenStream, length: int, stride: int, batch_size: int, limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Inputs, targets and what to score [B, T], and the bytes of text of the scored targets."""
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    num_bytes, done, start = 0, 0, 0  # targets 1..done of the stream are scored already
    while done < limit:
        stop = min(start + length, limit)
        window = stream.read(start, stop + 1)
        positions = np.arange(start + 1, stop + 1)
        rows.append((window[:-1], window[1:], positions > done))
        num_bytes += int(stream.read_bytes(done + 1, stop + 1).sum()) if stream.measured else 0
        done, start = stop, start + stride
        if len(rows) == batch_size or done == limit:
            # Only the last window can be shorter; what pads it on the right is neither seen nor scored.
            width = len(rows[0][0])
            inputs, targets, scored = (
                np.stack([np.pad(part, (0, width - len(part))) for part in column])
                for column in zip(*rows, strict=True)
            )
            yield inputs, targets, scored, num_bytes
            rows, num_bytes = [], 0


def _document_ids(ids: Tensor, eos_id: int | None) -> Tensor | None:
    if eos_id is None:
        return None
    ended = (ids == eos_id).long()
    return ended.cumsum(dim=1) - ended
