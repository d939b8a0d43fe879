"""Next-token cross-entropy fused with the output projection, so that the logits of a batch never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**19  # logits made at a time: small enough for a processor's cache, large enough for its matmuls


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weightᵀ)[target], as a float32 scalar.

    hidden [N, C] and weight [V, C] in any float type (autocast is honoured), targets [N] int64. The gradients are
    worked out chunk by chunk in the forward pass, so memory is O(N·C + V·C) instead of O(N·V).
    """
    if not torch.is_grad_enabled():  # which the function below cannot see: it would work out gradients in vain
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            accurate = torch.promote_types(dtype, torch.float32)
            want_hidden, want_weight, _ = ctx.needs_input_grad
            hidden_grad = torch.empty_like(hidden) if want_hidden else None
            weight_grad = torch.zeros_like(weight, dtype=accurate) if want_weight else None
            total = torch.zeros((), dtype=accurate, device=hidden.device)
            rows = max(1, CHUNK_ELEMENTS // weight.shape[0]) if device == "cpu" else 4096
            for start in range(0, hidden.shape[0], rows):
                chunk, target = h[start : start + rows], targets[start : start + rows, None]
                logits = (chunk @ w.T).to(accurate)
                normaliser = logits.logsumexp(dim=-1, keepdim=True)
                total += (normaliser - logits.gather(1, target)).sum()
                if hidden_grad is None and weight_grad is None:
                    continue
                logits.sub_(normaliser).exp_().scatter_add_(1, target, torch.full_like(normaliser, -1.0))
                logits_grad = logits.to(dtype)
                if hidden_grad is not None:
                    hidden_grad[start : start + rows] = logits_grad @ w
                if weight_grad is not None:
                    weight_grad += (logits_grad.T @ chunk).to(accurate)
            ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (scale,) = grad_outputs
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * scale,
            None if weight_grad is None else weight_grad * scale,
            None,
        )
