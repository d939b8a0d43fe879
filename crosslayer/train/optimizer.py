"""AdamW and the learning-rate schedule of the paper's recipe (arXiv 2405.12981, appendix on training)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def make_optimizer(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices only; gains and biases are left alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def clipped_step(optimizer: torch.optim.AdamW, max_norm: float) -> Tensor:
    """Step with gradients scaled down to a total norm of at most `max_norm`; returns the norm before, on the device.

    The scale goes into the fused kernel, which saves a pass over all gradients. A norm that is not finite leaves the
    weights and moments as they are.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = total_norm(grads)
    optimizer.grad_scale = (norm / max_norm).clamp(min=1.0).float()  # type: ignore[attr-defined]
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    return norm


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients together; of DTensors, over the shards of all processes."""
    by_layout: dict[tuple[DeviceMesh, tuple[bool, ...]], list[DTensor]] = defaultdict(list)
    for grad in grads:
        if isinstance(grad, DTensor):
            sharded = tuple(not placement.is_replicate() for placement in grad.placements)
            by_layout[grad.device_mesh, sharded].append(grad)
    if not by_layout:
        return get_total_norm(grads)
    squares = []
    for (mesh, sharded), shards in by_layout.items():
        # One sum over the processes for each layout, not for each gradient.
        square = get_total_norm([shard.to_local() for shard in shards]) ** 2
        for dimension in range(mesh.ndim):
            if sharded[dimension]:
                dist.all_reduce(square, group=mesh.get_group(dimension))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def learning_rate_at(step: int, steps: int, *, peak: float, warmup_ratio: float, final_ratio: float) -> float:
    """Linear warm-up over the first `warmup_ratio` of `steps`, then a cosine down to `final_ratio` of the peak.

    `step` counts from 0; the last step of the warm-up has the peak rate, the last of all `final_ratio` of it.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step + 1 - warmup) / (steps - warmup)
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
