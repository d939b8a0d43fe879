"""Matrix products together with what comes right before and after them in a layer.

`x` [N, K] is the residual stream, which has not been normalised: the gain of the norm is part of the weight, and the
division by the root mean square commutes with the product, so it is left to whoever handles the product next.

With few rows on a GPU, the time of a product is that of reading its weight, and one kernel does all at once; with more,
cuBLAS makes the product, and a second kernel the rest. All tensors are contiguous. Kernels for few rows read the weight
before the kernel that was launched before them has ended, so that one must not have written the weight.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from crosslayer.kernels.rope_store import rope_store
from crosslayer.kernels.swiglu import swiglu

# Up to so many rows, a fused kernel keeps its part of the weight in registers; up to so many, it uses tensor cores.
IN_REGISTERS, ON_TENSOR_CORES = 4, 64


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
    fused = _fused(x)
    if fused is not None and q_gain is None and k_gain is None:  # these need whole heads, which no program has
        made: Tensor = fused.project_rope_store(
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
        return made
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
    fused = _fused(x)
    if fused is not None:
        made: Tensor = fused.project_swiglu(x, weight, eps)
        return made
    return swiglu(linear(x, weight), x, eps)


def project_add(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """Add x [N, K] times weight [hidden, K] to residual [N, hidden]."""
    if _fit_registers(x):
        from crosslayer.kernels import few_rows_triton

        few_rows_triton.project_add(x, weight, residual)
    else:
        residual.addmm_(x, weight.T)


def project_logits(x: Tensor, weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Logits [N, vocab_size] of the residual stream."""
    if _fit_registers(x):
        from crosslayer.kernels import few_rows_triton

        return few_rows_triton.project_logits(x, weight, gain, eps)
    return linear(rms_norm(x, gain.shape, gain, eps), weight)


def _fused(x: Tensor) -> ModuleType | None:
    """The kernels for as many rows as x has, if there are any."""
    # Triton is there only where there is a GPU.
    if _fit_registers(x):
        from crosslayer.kernels import few_rows_triton

        return few_rows_triton
    if x.is_cuda and x.element_size() == 2 and 0 < len(x) <= ON_TENSOR_CORES:
        from crosslayer.kernels import skinny_triton

        return skinny_triton
    return None


def _fit_registers(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and 0 < len(x) <= IN_REGISTERS
