"""The loss of rows of logits, and its gradient by them, in two passes over the logits.

A row of a large vocabulary does not fit in registers, so a compiler reads it three times and writes it once. Here the
first pass keeps a running maximum and sum, and the second finds the row still in the L2 cache.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, want_grad: bool) -> Tensor:
    """Loss [N] of logits [N, V] by targets [N] (int64; a negative one counts for nothing), at least in float32.

    With `want_grad`, `logits` is overwritten by the gradient of the summed loss.
    """
    if logits.is_cuda and logits.dtype != torch.float64:
        # Triton is there only where there is a GPU.
        from crosslayer.kernels.cross_entropy_triton import launch_cross_entropy

        return launch_cross_entropy(logits, targets, want_grad)
    return cross_entropy_in_pytorch(logits, targets, want_grad)


def cross_entropy_in_pytorch(logits: Tensor, targets: Tensor, want_grad: bool) -> Tensor:
    """What `cross_entropy` says, for any device and float type."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = exact.logsumexp(dim=-1)
    counts = targets >= 0
    places = targets.clamp(min=0)[:, None]
    losses = torch.where(counts, normaliser - exact.gather(1, places).squeeze(1), 0.0)
    if want_grad:
        gradient = (exact - normaliser[:, None]).exp_().scatter_add_(1, places, exact.new_full(places.shape, -1.0))
        logits.copy_(gradient * counts[:, None])
    return losses
