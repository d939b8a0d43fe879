"""AdamW and the learning-rate schedule of the paper's recipe (arXiv 2405.12981, appendix on training)."""

from __future__ import annotations

import math

import torch
from torch import nn


def make_optimizer(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices only; gains and biases are left alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def learning_rate_at(step: int, steps: int, *, peak: float, warmup_ratio: float, final_ratio: float) -> float:
    """Linear warm-up over the first `warmup_ratio` of `steps`, then a cosine down to `final_ratio` of the peak.

    `step` counts from 0; the last step's rate is `final_ratio * peak`.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - 1 - warmup, 1)
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
