"""The Triton kernel of `rope_store`: one program a token, with all heads of it in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosslayer.kernels.dependent_launch_triton import dependent_launch, follow
from crosslayer.kernels.rms_triton import inverse_rms


@triton.jit
def _load(row, first_head, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Both halves of HEADS heads, in float32, where they begin, and which of a tile of powers of two there are."""
    heads = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    pairs = tl.arange(0, triton.next_power_of_2(DIM // 2))[None, :]
    inside = (heads < HEADS) & (pairs < DIM // 2)
    offsets = (first_head + heads) * DIM + pairs
    first = tl.load(row + offsets, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + offsets + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    return first, second, offsets, inside


@triton.jit
def _normalised(first, second, offsets, inside, bias, inverse, DIM: tl.constexpr):
    first *= inverse
    second *= inverse
    if bias is not None:
        first += tl.load(bias + offsets, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(bias + offsets + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _turned(first, second, gain, cos, sin, eps, DIM: tl.constexpr):
    if gain is not None:
        pairs = tl.arange(0, triton.next_power_of_2(DIM // 2))[None, :]
        inside = pairs < DIM // 2
        inverse = tl.rsqrt(tl.sum(first * first + second * second, 1) / DIM + eps)[:, None]
        first *= inverse * tl.load(gain + pairs, mask=inside, other=0.0).to(tl.float32)
        second *= inverse * tl.load(gain + DIM // 2 + pairs, mask=inside, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def store_pair(to, first, second, mask, HALF: tl.constexpr, LIMIT: tl.constexpr):
    """Components i and i + HALF, kept within the limit: the conversion alone may make NaN of what is too large."""
    if LIMIT is not None:
        first = tl.clamp(first, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        second = tl.clamp(second, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    tl.store(to, first.to(to.dtype.element_ty), mask=mask)
    tl.store(to + HALF, second.to(to.dtype.element_ty), mask=mask)


@triton.jit
def store_new(
    first, second, head, i, place, exists, keys, values, key_scale, value_scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, KEY_LIMIT: tl.constexpr, VALUE_LIMIT: tl.constexpr,
):  # fmt: skip
    """Components i and i + DIM / 2 of those of a projection's heads that are keys or values, to their places."""
    FIRST_VALUE: tl.constexpr = HEADS if keys is None else HEADS + GROUPS
    stored = exists & (place >= 0)
    if keys is not None:
        to = keys + (place * GROUPS + head - HEADS) * DIM + i
        mine = stored & (head >= HEADS) & (head < HEADS + GROUPS)
        store_pair(to, first / key_scale, second / key_scale, mine, DIM // 2, KEY_LIMIT)
    if values is not None:
        to = values + (place * GROUPS + head - FIRST_VALUE) * DIM + i
        mine = stored & (head >= FIRST_VALUE)
        store_pair(to, first / value_scale, second / value_scale, mine, DIM // 2, VALUE_LIMIT)


@triton.jit
def _store(first, second, pool, place, scale, inside, HEADS: tl.constexpr, DIM: tl.constexpr, LIMIT: tl.constexpr):
    heads = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    pairs = tl.arange(0, triton.next_power_of_2(DIM // 2))[None, :]
    first /= scale
    second /= scale
    to = pool + place * (HEADS * DIM) + heads * DIM + pairs
    store_pair(to, first, second, inside & (place >= 0), DIM // 2, LIMIT)


# Where `places` begins in memory changes from step to step, and must not compile the kernel anew.
@triton.jit(do_not_specialize_on_alignment=["places"])
def rope_store_kernel(
    heads,
    residual,
    cos,
    sin,
    bias,
    q_gain,
    k_gain,
    keys,
    values,
    places,
    heads_stride,
    residual_stride,
    eps,
    key_scale,
    value_scale,
    HIDDEN: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    KEY_LIMIT: tl.constexpr,
    VALUE_LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = heads + token * heads_stride
    # All loads before the reduction, so that their waits overlap.
    q_first, q_second, q_offsets, q_inside = _load(row, 0, HEADS, DIM)
    if keys is not None:
        k_first, k_second, k_offsets, inside = _load(row, HEADS, GROUPS, DIM)
    if values is not None:
        first_value: tl.constexpr = HEADS if keys is None else HEADS + GROUPS
        v_first, v_second, v_offsets, inside = _load(row, first_value, GROUPS, DIM)
    place = tl.load(places + token)
    pairs = tl.arange(0, triton.next_power_of_2(DIM // 2))[None, :]
    c = tl.load(cos + token * (DIM // 2) + pairs, mask=pairs < DIM // 2, other=0.0)
    s = tl.load(sin + token * (DIM // 2) + pairs, mask=pairs < DIM // 2, other=0.0)
    inverse = inverse_rms(residual + token * residual_stride, eps, HIDDEN)

    q_first, q_second = _normalised(q_first, q_second, q_offsets, q_inside, bias, inverse, DIM)
    q_first, q_second = _turned(q_first, q_second, q_gain, c, s, eps, DIM)
    tl.debug_barrier()  # the queries are written where they were read, by whichever thread
    store_pair(row + q_offsets, q_first, q_second, q_inside, DIM // 2, None)
    if keys is not None:
        k_first, k_second = _normalised(k_first, k_second, k_offsets, inside, bias, inverse, DIM)
        k_first, k_second = _turned(k_first, k_second, k_gain, c, s, eps, DIM)
        _store(k_first, k_second, keys, place, key_scale, inside, GROUPS, DIM, KEY_LIMIT)
    if values is not None:
        v_first, v_second = _normalised(v_first, v_second, v_offsets, inside, bias, inverse, DIM)
        _store(v_first, v_second, values, place, value_scale, inside, GROUPS, DIM, VALUE_LIMIT)


def limit_of(pool: Tensor | None) -> float | None:
    """The largest number that a pool can hold."""
    return None if pool is None else torch.finfo(pool.dtype).max


def launch_rope_store(
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
    tokens, _, dim = heads.shape
    if tokens:
        rope_store_kernel[(tokens,)](
            heads,
            residual,
            cos,
            sin,
            bias,
            *gains,
            *pools,
            places,
            heads.stride(0),
            residual.stride(0),
            eps,
            *scales,
            HIDDEN=residual.shape[1],
            HEADS=num_heads,
            GROUPS=num_kv_heads,
            DIM=dim,
            KEY_LIMIT=limit_of(pools[0]),
            VALUE_LIMIT=limit_of(pools[1]),
            num_warps=4 if num_heads * dim <= 4096 else 8,
            **dependent_launch(heads),
        )
