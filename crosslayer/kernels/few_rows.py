"""The linear layers of a decoder for a step of one to four tokens, with what stands around them.

Such a step is as fast as the weights are read, so each product takes along the norm before it and whatever follows it,
and nothing but weights and a few vectors passes through memory. The gains of norms are folded into the weights, except
the last one's, whose weight may be the embedding too.

In every function x is [N, K] in the weight's dtype, tensors are contiguous, and RMS(x) is sqrt(mean(x²) + eps). On a
GPU (float64 aside) N is at most `MOST_ROWS`, and all is float32 inside, with one rounding at the end. There a kernel
reads its weight before the kernel launched before it has ended, so that one must not have written the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

MOST_ROWS = 4

P = ParamSpec("P")
R = TypeVar("R")


def _with_kernel(twin: Callable[P, R]) -> Callable[P, R]:
    """The function of the same name in `few_rows_triton` where x is on a GPU, and elsewhere this one."""

    @wraps(twin)
    def project(*args: P.args, **kwargs: P.kwargs) -> R:
        x = cast(Tensor, args[0])
        if not x.is_cuda or x.dtype == torch.float64:
            return twin(*args, **kwargs)
        # Triton is there only where there is a GPU.
        from crosslayer.kernels import few_rows_triton

        assert len(x) <= MOST_ROWS
        return cast(R, getattr(few_rows_triton, twin.__name__)(*args, **kwargs))

    return project


@_with_kernel
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
    keys: Tensor | None,
    values: Tensor | None,
    places: Tensor,
    key_scale: float,
    value_scale: float,
) -> Tensor:
    """The rotated queries [N, H, D] of x; its rotated keys and its values are stored.

    weight [W, K] and bias [W] have the rows of H query heads, then of G key heads if `keys` is given, then of G value
    heads if `values` is given: x weightᵀ / RMS(x) + bias. cos and sin, float32 [N, D/2], rotate pairs i and i + D/2.
    Token n goes to place places[n] (int64; negative: nowhere), counted in tokens, of the pools `keys` and `values`
    [blocks, block_size, G, D], divided by their scale and kept within the range of their dtype.

    A norm of each head before its rotation (q_norm, k_norm) is not here: it needs the whole head at once.
    """
    y = _product(x, weight, eps)
    if bias is not None:
        y = y + bias
    heads = y.view(len(x), -1, head_dim)
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    if keys is not None:
        _store(keys, places, rotated[:, num_heads : num_heads + num_kv_heads] / key_scale)
    if values is not None:
        _store(values, places, heads[:, heads.shape[1] - num_kv_heads :] / value_scale)
    return rotated[:, :num_heads].to(x.dtype)


@_with_kernel
def project_swiglu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """silu(gate) · up [N, I]: x / RMS(x) by the first I rows of weight [2I, K], the gate, and by the last I rows."""
    gate, up = _product(x, weight, eps).chunk(2, dim=-1)
    return (silu(gate) * up).to(x.dtype)


@_with_kernel
def project_add(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """Add x weightᵀ, of weight [M, K], to residual [N, M]."""
    residual.copy_(_product(x, weight) + residual)


@_with_kernel
def project_logits(x: Tensor, weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Logits [N, V], at least float32, of x / RMS(x) · gain by weight [V, K]."""
    return _product(x * gain, weight) * _inverse_rms(x, eps)


def _product(x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
    """x weightᵀ, and, given an eps, its quotient by RMS(x): at least in float32, after the matrix product."""
    product = linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    return product if eps is None else product * _inverse_rms(x, eps)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def _store(pool: Tensor, places: Tensor, heads: Tensor) -> None:
    limits = torch.finfo(pool.dtype)  # the conversion alone may make NaN of what is too large
    stored = places >= 0
    pool.flatten(0, 1)[places[stored]] = heads[stored].clamp(limits.min, limits.max).to(pool.dtype)
