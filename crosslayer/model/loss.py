"""Next-token cross-entropy fused with the output projection, so that the logits of a batch never exist at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from crosslayer.kernels.cross_entropy import cross_entropy
from crosslayer.model.spread_loss import spread_cross_entropy

# Logits made at a time. On a CPU few enough for its cache; on a GPU enough rows for the matmuls to run at full speed.
CPU_CHUNK = 2**19
GPU_CHUNK = 2**30


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weightᵀ)[target], as a scalar of at least float32.

    hidden [N, C] and weight [V, C] in any float type (autocast is honoured), targets [N] int64, of which negative ones
    count for nothing. The gradients are worked out chunk by chunk in the forward pass, so memory is O(N·C + V·C)
    instead of O(N·V).

    A DTensor `weight` has its rows spread evenly over a group of processes, all of which bring the same `hidden` and
    `targets`, and get the same loss and gradient of `hidden`.
    """
    if not torch.is_grad_enabled():  # which the function below cannot see: it would work out gradients in vain
        hidden, weight = hidden.detach(), weight.detach()
    group = None
    if isinstance(weight, DTensor):
        group, weight = weight.device_mesh.get_group(), weight.to_local()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, group)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            accurate = torch.promote_types(dtype, torch.float32)
            want_hidden, want_weight, *_ = ctx.needs_input_grad
            hidden_grad = torch.empty_like(h) if want_hidden else None
            weight_grad: Tensor | None = None
            total = torch.zeros((), dtype=accurate, device=hidden.device)
            rows, want_grad = _chunk_rows(weight.shape[0], device), want_hidden or want_weight
            for start in range(0, hidden.shape[0], rows):
                chunk = h[start : start + rows]
                logits, wanted = chunk @ w.T, targets[start : start + rows]
                if group is None:
                    losses = cross_entropy(logits, wanted, want_grad)
                else:
                    losses = spread_cross_entropy(logits, wanted, want_grad, group)
                total += losses.sum()
                if hidden_grad is not None:  # logits holds their gradient now
                    torch.mm(logits, w, out=hidden_grad[start : start + rows])
                if want_weight:
                    part = (logits.T @ chunk).to(accurate)
                    weight_grad = part if weight_grad is None else weight_grad.add_(part)
                del logits  # or they would still be there while the next chunk's are made
            if group is not None and hidden_grad is not None:
                dist.all_reduce(hidden_grad, group=group)
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (scale,) = grad_outputs
        hidden_grad, weight_grad = (
            None if grad is None else (grad * scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return hidden_grad, weight_grad, None, None


def _chunk_rows(vocab_size: int, device: str) -> int:
    if device != "cuda":
        return max(1, CPU_CHUNK // vocab_size)
    return max(1, GPU_CHUNK // vocab_size // 1024) * 1024  # whole tiles of the matmul
