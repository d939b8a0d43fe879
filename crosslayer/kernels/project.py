"""Matrix products together with what comes right before and after them in a layer.

`x` [N, K] is the residual stream, which has not been normalised: the gain of the norm is part of the weight, and the
division by the root mean square commutes with the product, so it is left to whoever handles the product next.

With few rows on a GPU, the time of a product is that of reading its weight, and one kernel does all at once; with more,
cuBLAS makes the product, and a second kernel the rest. All tensors are contiguous. Kernels for few rows read the weight
before the kernel that was launched before them has ended, so that one must not have written the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from crosslayer.kernels.rope_store import rope_store
from crosslayer.kernels.swiglu import swiglu

# Beyond so many rows, cuBLAS and a second kernel are faster.
FEW_ROWS = 2


def project_rope_store(
    x: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    bias: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    places: Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """Queries [N, H, D] of x [N, hidden] by weight [W, hidden]; keys and values go into pools (see `rope_store`)."""
    if _are_few(x) and q_gain is None and k_gain is None:  # these need whole heads, which no program has
        from crosslayer.kernels import few_rows_triton

        return few_rows_triton.project_rope_store(
            x,
            weight,
            eps,
            cos,
            sin,
            head_dim=head_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            bias=bias,
            keys=keys,
            values=values,
            places=places,
            key_scale=key_scale,
            value_scale=value_scale,
        )
    return rope_store(
        linear(x, weight),
        x,
        eps,
        cos,
        sin,
        head_dim=head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        bias=bias,
        q_gain=q_gain,
        k_gain=k_gain,
        keys=keys,
        values=values,
        places=places,
        key_scale=key_scale,
        value_scale=value_scale,
    )


def project_swiglu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """SwiGLU [N, I] of the normalised x [N, hidden], by weight [2 I, hidden]: gates, then what they let through."""
    if _are_few(x):
        from crosslayer.kernels import few_rows_triton

        return few_rows_triton.project_swiglu(x, weight, eps)
    return swiglu(linear(x, weight), x, eps)


def project_add(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """Add x [N, K] times weight [hidden, K] to residual [N, hidden]."""
    if _are_few(x):
        from crosslayer.kernels import few_rows_triton

        few_rows_triton.project_add(x, weight, residual)
    else:
        residual.addmm_(x, weight.T)


def project_logits(x: Tensor, weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Logits [N, vocab_size] of the residual stream."""
    if _are_few(x):
        from crosslayer.kernels import few_rows_triton

        return few_rows_triton.project_logits(x, weight, gain, eps)
    return linear(rms_norm(x, gain.shape, gain, eps), weight)


def _are_few(x: Tensor) -> bool:
    # Triton is there only where there is a GPU.
    return x.is_cuda and x.dtype != torch.float64 and 0 < len(x) <= FEW_ROWS
