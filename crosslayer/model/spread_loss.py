"""The loss of logits whose columns, the vocabulary, are spread over processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def spread_cross_entropy(logits: Tensor, targets: Tensor, want_grad: bool, group: dist.ProcessGroup) -> Tensor:
    """Loss [N], at least in float32, of rows of logits by targets [N] (int64; a negative one counts for nothing).

    Each process of `group` brings V columns of the rows, `logits` [N, V], in the order of their ranks, and the same
    `targets`; all get the same losses. With `want_grad`, `logits` is overwritten by the gradient of the summed loss.
    """
    terms, finish = (_compiled(_terms), _compiled(_finish)) if logits.is_cuda else (_terms, _finish)
    first = dist.get_rank(group) * logits.shape[1]
    mine = terms(logits, targets, first)
    all_terms = mine.new_empty((dist.get_world_size(group), *mine.shape))
    dist.all_gather([*all_terms], mine, group=group)
    normaliser, wanted = all_terms[:, 0].logsumexp(dim=0), all_terms[:, 1].sum(dim=0)
    if want_grad:
        finish(logits, targets, first, normaliser)
    return torch.where(targets >= 0, normaliser - wanted, 0.0)


def _terms(logits: Tensor, targets: Tensor, first: int) -> Tensor:
    """[2, N]: the logsumexp of each row, and the logit of its target, 0 where that is not among these columns, of
    which the first has the number `first`."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    columns = targets - first
    here = (columns >= 0) & (columns < logits.shape[1])
    wanted = exact.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    return torch.stack((exact.logsumexp(dim=1), torch.where(here, wanted, 0.0)))


def _finish(logits: Tensor, targets: Tensor, first: int, normaliser: Tensor) -> None:
    """Overwrite the logits by the gradient, once the logsumexp of the whole rows is known."""
    hit = torch.arange(first, first + logits.shape[1], device=logits.device) == targets[:, None]
    gradient = (logits.to(normaliser.dtype) - normaliser[:, None]).exp() - hit.to(normaliser.dtype)
    logits.copy_(torch.where(targets[:, None] >= 0, gradient, 0.0))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
