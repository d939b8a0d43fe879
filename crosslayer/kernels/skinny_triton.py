"""Triton kernels of `project` for some dozens of rows: products on tensor cores, with what comes right after them.

The time is still that of reading the weight, and a kernel of its own for what follows would cost a fifth on top. As in
`few_rows_triton`, what follows needs two rows of the weight at a time: those of a rotated pair, or a gate's and its up
projection's. A program takes some of the first and the same of the second, as one matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from crosslayer.kernels.few_rows_triton import can_overlap


class Tile(NamedTuple):
    """How a kernel is cut into programs: pairs of rows of the weight, columns at a time, and Triton's own choices."""

    pairs: int
    columns: int
    num_warps: int
    num_stages: int

    def options(self, x: Tensor) -> dict[str, int | bool]:
        count, columns = x.shape
        overlap = can_overlap(x.device)
        return {
            "K": columns,
            "COUNT": max(16, triton.next_power_of_2(count)),
            "PAIRS": self.pairs,
            "COLUMNS": self.columns,
            "OVERLAP": overlap,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        } | ({"launch_pdl": True} if overlap else {})


ROPE_STORE = Tile(pairs=16, columns=128, num_warps=4, num_stages=5)
SWIGLU = Tile(pairs=32, columns=64, num_warps=4, num_stages=6)


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
    tile: Tile = ROPE_STORE,
) -> Tensor:
    q = x.new_empty(len(x), num_heads, head_dim)
    pool = keys if keys is not None else values
    pairs = len(weight) // 2
    rope_store_kernel[(triton.cdiv(pairs, tile.pairs),)](
        x,
        weight,
        bias,
        cos,
        sin,
        q,
        keys,
        values,
        places,
        len(x),
        pairs,
        eps,
        key_scale,
        value_scale,
        HEAD_DIM=head_dim,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        LIMIT=None if pool is None else torch.finfo(pool.dtype).max,
        **tile.options(x),
    )
    return q


def project_swiglu(x: Tensor, weight: Tensor, eps: float, *, tile: Tile = SWIGLU) -> Tensor:
    size = len(weight) // 2
    out = x.new_empty(len(x), size)
    swiglu_kernel[(triton.cdiv(size, tile.pairs),)](x, weight, out, len(x), size, eps, **tile.options(x))
    return out


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def rope_store_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    cos,
    sin,
    q,
    keys,
    values,
    places,
    count,
    num_pairs,
    eps,
    key_scale,
    value_scale,
    HEAD_DIM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    LIMIT: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    FIRST_VALUE: tl.constexpr = NUM_HEADS if keys is None else NUM_HEADS + NUM_KV_HEADS
    pair = tl.minimum(tl.program_id(0) * PAIRS + tl.arange(0, 2 * PAIRS) % PAIRS, num_pairs - 1)
    row = pair // HALF * HEAD_DIM + pair % HALF + tl.arange(0, 2 * PAIRS) // PAIRS * HALF
    product, norm = _multiply(x, weight, row, count, eps, K, COUNT, COLUMNS, OVERLAP)
    y = product * norm[:, None]
    if bias is not None:
        y += tl.load(bias + row).to(tl.float32)[None, :]
    first, second = _halves(y, COUNT, PAIRS)

    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    head, i = pair // HALF, pair % HALF
    n = tl.arange(0, COUNT)
    exists = (n < count)[:, None] & (pair < num_pairs)[None, :]
    turns = exists & (head < FIRST_VALUE)[None, :]
    angle = n[:, None] * HALF + i[None, :]
    c = tl.load(cos + angle, mask=turns, other=1.0)
    s = tl.load(sin + angle, mask=turns, other=0.0)
    first, second = first * c - second * s, second * c + first * s
    to = q + (n[:, None] * NUM_HEADS + head[None, :]) * HEAD_DIM + i[None, :]
    _store_pair(to, first, second, exists & (head < NUM_HEADS)[None, :], HALF, None)
    place = tl.load(places + n, mask=n < count, other=-1)
    stored = exists & (place >= 0)[:, None]
    if keys is not None:
        to = keys + (place[:, None] * NUM_KV_HEADS + (head - NUM_HEADS)[None, :]) * HEAD_DIM + i[None, :]
        mine = stored & ((head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS))[None, :]
        _store_pair(to, first / key_scale, second / key_scale, mine, HALF, LIMIT)
    if values is not None:
        to = values + (place[:, None] * NUM_KV_HEADS + (head - FIRST_VALUE)[None, :]) * HEAD_DIM + i[None, :]
        mine = stored & (head >= FIRST_VALUE)[None, :]
        _store_pair(to, first / value_scale, second / value_scale, mine, HALF, LIMIT)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def swiglu_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    count,
    size,
    eps,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    place = tl.minimum(tl.program_id(0) * PAIRS + tl.arange(0, 2 * PAIRS) % PAIRS, size - 1)
    row = place + tl.arange(0, 2 * PAIRS) // PAIRS * size
    product, norm = _multiply(x, weight, row, count, eps, K, COUNT, COLUMNS, OVERLAP)
    gate, up = _halves(product * norm[:, None], COUNT, PAIRS)
    y = gate * tl.sigmoid(gate) * up
    n = tl.arange(0, COUNT)
    place = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    to = out + n[:, None] * size + place[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=(n < count)[:, None] & (place < size)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, row, count, eps, K: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr
):
    """Products [COUNT, rows] of x and the rows `row` of the weight, and 1/RMS [COUNT] of x."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.arange(0, COUNT)
    column = tl.arange(0, COLUMNS)
    x += n[:, None] * K + column[None, :]
    weight += row.to(tl.int64)[:, None] * K + column[None, :]
    product = tl.zeros((COUNT, row.shape[0]), tl.float32)
    squares = tl.zeros((COUNT,), tl.float32)
    for first in tl.range(0, K, COLUMNS):
        inside = (first + column < K)[None, :]
        if K % COLUMNS == 0:
            x_tile = tl.load(x + first, mask=(n < count)[:, None], other=0.0)
            weight_tile = tl.load(weight + first)
        else:
            x_tile = tl.load(x + first, mask=(n < count)[:, None] & inside, other=0.0)
            weight_tile = tl.load(weight + first, mask=inside, other=0.0)
        product = tl.dot(x_tile, tl.trans(weight_tile), product)
        exact = x_tile.to(tl.float32)
        squares += tl.sum(exact * exact, 1)
    return product, tl.rsqrt(squares / K + eps)


@triton.jit  # type: ignore[untyped-decorator]
def _halves(y, COUNT: tl.constexpr, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.split(tl.permute(tl.reshape(y, (COUNT, 2, PAIRS)), (0, 2, 1)))


@triton.jit  # type: ignore[untyped-decorator]
def _store_pair(to, first, second, mask, HALF: tl.constexpr, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Components i and i + D/2, kept within the limit: the conversion alone may make NaN of what is too large."""
    if LIMIT is not None:
        first = tl.clamp(first, -LIMIT, LIMIT, tl.PropagateNan.ALL)
        second = tl.clamp(second, -LIMIT, LIMIT, tl.PropagateNan.ALL)
    tl.store(to, first.to(to.dtype.element_ty), mask=mask)
    tl.store(to + HALF, second.to(to.dtype.element_ty), mask=mask)
