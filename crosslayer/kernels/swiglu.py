"""SwiGLU of a normalised input, with the normalisation after the matrix product instead of before it.

RMS normalisation divides a whole row by one number and multiplies columns by gains. The gains fold into the weights,
the number passes through the product, and what is left of the norm costs no pass over memory of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from crosslayer.kernels.rms import inverse_rms


def swiglu(gate_up: Tensor, residual: Tensor, eps: float) -> Tensor:
    """silu(r * gate) * (r * up), [N, I], with r = 1 / sqrt(mean(residual²) + eps) of each row.

    `gate_up` [N, 2I] is the product of `residual` [N, hidden] and the weights of gate and up, side by side. Computed at
    least in float32, rounded once.
    """
    if gate_up.is_cuda and gate_up.dtype != torch.float64:
        # Triton is there only where there is a GPU.
        from crosslayer.kernels.swiglu_triton import launch_swiglu

        return launch_swiglu(gate_up, residual, eps)
    return swiglu_in_pytorch(gate_up, residual, eps)


def swiglu_in_pytorch(gate_up: Tensor, residual: Tensor, eps: float) -> Tensor:
    """What `swiglu` says, for any device and float type."""
    exact = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = (gate_up.to(exact) * inverse_rms(residual.to(exact), eps)).chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up.dtype)
