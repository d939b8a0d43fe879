"""Matrix products together with what comes right before and after them in a layer.

`x` is the residual stream, which has not been normalised: the gain of the norm is part of the weight, and the division
by the root mean square commutes with the product, so it is left to whoever handles the product next.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear, rms_norm

from crosslayer.kernels.rope_store import rope_store
from crosslayer.kernels.swiglu import swiglu


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
    return swiglu(linear(x, weight), x, eps)


def project_add(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """Add x [N, K] times weight [hidden, K] to residual [N, hidden]."""
    residual.addmm_(x, weight.T)


def project_logits(x: Tensor, weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Logits [N, vocab_size] of the residual stream."""
    return linear(rms_norm(x, gain.shape, gain, eps), weight)
