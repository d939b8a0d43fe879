"""What RMS normalisation divides by; the kernels that normalise as they go share it."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) over the last dimension of x [..., D], kept as [..., 1]."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
