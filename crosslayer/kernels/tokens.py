"""Where a step begins and ends: embeddings of tokens that the host may not know yet, and the likeliest next ones."""

from __future__ import annotations

import torch
from torch import Tensor


def embed(
    ids: Tensor, slots: Tensor, last: Tensor, embedding: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [N, hidden] and rows of the tables `cos` and `sin` [positions there are, D/2] of N tokens.

    A negative one of `ids` [N] stands for last[slots[n]]. `embedding` is [vocab_size, hidden]; integers are int64.
    """
    if ids.is_cuda:
        # Triton is there only where there is a GPU.
        from crosslayer.kernels.tokens_triton import launch_embed

        return launch_embed(ids, slots, last, embedding, positions, cos, sin)
    known = torch.where(ids < 0, last[slots], ids)
    return embedding[known], cos[positions], sin[positions]


def likeliest(logits: Tensor, slots: Tensor, last: Tensor) -> Tensor:
    """The largest of each row of logits [N, V], the first of equal ones, int64 [N]; it also becomes last[slots[n]]."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from crosslayer.kernels.tokens_triton import launch_likeliest

        return launch_likeliest(logits, slots, last)
    tokens = logits.argmax(dim=-1)
    last.index_copy_(0, slots, tokens)
    return tokens
