"""What comes between the projections of a layer and its attention, in one pass: norms, bias, RoPE, and the cache.

As in `swiglu`, the projections are made of the residual stream as it is, with the gains of the norm before them folded
into the weights, and divided by its root mean square here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosslayer.kernels.rms import inverse_rms


def rope_store(
    qkv: Tensor,
    residual: Tensor,
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
    """Finish queries, keys and values of N tokens, store keys and values, and return the queries.

    Args:
        qkv: [N, W], the product of `residual` and the weights: `num_heads` query heads of `head_dim`, then
            `num_kv_heads` heads of keys if `keys` is given, then as many of values if `values` is given.
        residual: [N, hidden]; a row of `qkv` is multiplied by 1 / sqrt(mean(residual²) + eps).
        cos: [N, D/2], float32, as is `sin`; they turn component i with i + D/2.
        bias: [W], added after that.
        q_gain: [D], as is `k_gain`: each head of queries or keys is RMS-normalised, with `eps`, before it is turned.
        keys: pool [blocks, block_size, G, D] that takes the keys divided by `key_scale` and clipped to what its type
            can say, as `values` takes the values divided by `value_scale`.
        places: int64 [N], where in the pools a token goes, counted in tokens; -1: nowhere.

    Computed at least in float32, rounded once. The queries take their old place in `qkv`, and the result, [N, H, D], is
    a view of it.
    """
    if qkv.is_cuda and qkv.dtype != torch.float64:
        # Triton is there only where there is a GPU.
        from crosslayer.kernels.rope_store_triton import launch_rope_store as finish
    else:
        finish = rope_store_in_pytorch
    heads = qkv.view(len(qkv), -1, head_dim)
    gains, pools, scales = (q_gain, k_gain), (keys, values), (key_scale, value_scale)
    finish(heads, residual, eps, cos, sin, num_heads, num_kv_heads, bias, gains, pools, places, scales)
    return heads[:, :num_heads]


def rope_store_in_pytorch(
    heads: Tensor,
    residual: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    bias: Tensor | None,
    gains: tuple[Tensor | None, Tensor | None],
    pools: tuple[Tensor | None, Tensor | None],
    places: Tensor,
    scales: tuple[float, float],
) -> None:
    """What `rope_store` does to heads [N, W / D, D], for any device and float type."""
    dtype = torch.promote_types(heads.dtype, torch.float32)
    exact = heads.to(dtype) * inverse_rms(residual.to(dtype), eps)[..., None]
    if bias is not None:
        exact = exact + bias.view(-1, heads.shape[2])
    q, *made = torch.split(exact, [num_heads] + [num_kv_heads] * sum(pool is not None for pool in pools), dim=1)

    def turned(x: Tensor, gain: Tensor | None) -> Tensor:
        if gain is not None:
            x = x * inverse_rms(x, eps) * gain
        first, second = x.chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    heads[:, :num_heads] = turned(q, gains[0]).to(heads.dtype)
    if pools[0] is not None:
        _store(turned(made[0], gains[1]), pools[0], places, scales[0])
    if pools[1] is not None:
        _store(made[-1], pools[1], places, scales[1])


def _store(tokens: Tensor, pool: Tensor, places: Tensor, scale: float) -> None:
    tokens = tokens / scale
    limits = torch.finfo(pool.dtype)  # the conversion alone may make NaN of what is too large
    kept = places >= 0
    pool.flatten(0, 1)[places[kept]] = tokens[kept].clamp(limits.min, limits.max).to(pool.dtype)
