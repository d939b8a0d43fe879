"""The Triton kernels of `project` for few rows: a product, the norm before it, and what follows it, at once.

A product of one row is as fast as its weights arrive. A program owns a few rows of the weight, and asks for all of them
at once, into registers: a multiprocessor holds some 100 KB that way, more than the 40 KB that must be under way for
the memory to be busy all the time.

Between two such kernels the memory would rest for some microseconds, as long as many of them run. So each lets the next
one begin at once (see `dependent_launch_triton`), which asks for its own weights, and only then waits for the kernels
before it.
"""

import triton
import triton.language as tl

from crosslayer.kernels.dependent_launch_triton import let_next_begin, wait_for_previous
from crosslayer.kernels.rope_store_triton import store_new, store_pair


@triton.jit
def rope_store_kernel(
    x, weight, bias, cos, sin, q, keys, values, places, num_pairs, eps, key_scale, value_scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, KEY_LIMIT: tl.constexpr, VALUE_LIMIT: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    # Half of a program's rows, and as far from each of them as rotation asks, the other half.
    pair = tl.minimum(tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS) % (ROWS // 2), num_pairs - 1)
    row = pair // HALF * DIM + pair % HALF + tl.arange(0, ROWS) // (ROWS // 2) * HALF
    tiles = _fetch_and_wait(weight, row, K, BLOCK, PDL)
    pair = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    head, i = pair // HALF, pair % HALF
    exists = pair < num_pairs
    FIRST_VALUE: tl.constexpr = HEADS if keys is None else HEADS + GROUPS
    for n in tl.static_range(N):
        place = tl.load(places + n)
        c = tl.load(cos + n * HALF + i)
        s = tl.load(sin + n * HALF + i)
        total, norm = _multiply(tiles, x + n * K, None, eps, K, BLOCK)
        y = norm * total
        if bias is not None:
            y += tl.load(bias + row).to(tl.float32)
        first, second = _halves(y, ROWS)
        turns = head < FIRST_VALUE
        c = tl.where(turns, c, 1.0)
        s = tl.where(turns, s, 0.0)
        first, second = first * c - second * s, second * c + first * s
        store_pair(q + (n * HEADS + head) * DIM + i, first, second, exists & (head < HEADS), HALF, None)
        store_new(
            first, second, head, i, place, exists, keys, values, key_scale, value_scale,
            HEADS, GROUPS, DIM, KEY_LIMIT, VALUE_LIMIT,
        )  # fmt: skip


@triton.jit
def swiglu_kernel(
    x, weight, output, size, eps,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Half of a program's rows are the gate's, the other half the same of the up projection.
    row = tl.minimum(tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS) % (ROWS // 2), size - 1)
    tiles = _fetch_and_wait(weight, row + tl.arange(0, ROWS) // (ROWS // 2) * size, K, BLOCK, PDL)
    row = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    for n in tl.static_range(N):
        total, norm = _multiply(tiles, x + n * K, None, eps, K, BLOCK)
        gate, up = _halves(norm * total, ROWS)
        y = gate * tl.sigmoid(gate) * up
        tl.store(output + n * size + row, y.to(output.dtype.element_ty), mask=row < size)


@triton.jit
def add_kernel(
    x, weight, residual, size,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tiles = _fetch_and_wait(weight, tl.minimum(row, size - 1), K, BLOCK, PDL)
    for n in tl.static_range(N):
        to = residual + n * size + row
        before = tl.load(to, mask=row < size).to(tl.float32)
        total, _ = _multiply(tiles, x + n * K, None, None, K, BLOCK)
        tl.store(to, (before + total).to(residual.dtype.element_ty), mask=row < size)


@triton.jit
def logits_kernel(
    x, weight, gain, output, size, eps,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tiles = _fetch_and_wait(weight, tl.minimum(row, size - 1), K, BLOCK, PDL)
    for n in tl.static_range(N):
        total, norm = _multiply(tiles, x + n * K, gain, eps, K, BLOCK)
        tl.store(output + n * size + row, norm * total, mask=row < size)


@triton.jit
def _fetch_and_wait(weight, row, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The rows `row` [ROWS] of the weight as tiles [ROWS, BLOCK], and the end of the kernels before."""
    let_next_begin(PDL)
    weight += row.to(tl.int64)[:, None] * K
    tiles = ()
    for first in tl.static_range(0, K, BLOCK):
        tiles = tiles + (_load_tile(weight, first, K, BLOCK, "evict_first"),)  # type: ignore[assignment]  # noqa: RUF005
    wait_for_previous(PDL)
    return tiles


@triton.jit
def _multiply(tiles, x, gain, eps, K: tl.constexpr, BLOCK: tl.constexpr):
    """Products [ROWS] of the tiles with x [K], times gain [K] if there is one; 1/RMS of x [ROWS], if there is an eps.

    x is read as if each row had one of its own: that is just what each warp needs to multiply its rows without a word
    from the others.
    """
    ROWS: tl.constexpr = tiles[0].shape[0]
    # What a thread holds of a row is summed at once, so that only the sums have to be kept.
    WIDE: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    rows = tl.zeros((ROWS, 1), tl.int32)
    total = tl.zeros((ROWS, BLOCK // WIDE), tl.float32)
    squares = tl.zeros((ROWS, BLOCK // WIDE), tl.float32)
    for step in tl.static_range(len(tiles)):
        part = _load_tile(x + rows, step * BLOCK, K, BLOCK, "").to(tl.float32)
        if eps is not None:
            squares += tl.sum(tl.reshape(part * part, (ROWS, BLOCK // WIDE, WIDE)), 2)
        if gain is not None:
            part *= _load_tile(gain + rows, step * BLOCK, K, BLOCK, "").to(tl.float32)
        total += tl.sum(tl.reshape(tiles[step].to(tl.float32) * part, (ROWS, BLOCK // WIDE, WIDE)), 2)
    norm = 1.0
    if eps is not None:
        norm = tl.rsqrt(tl.sum(squares, 1) / K + eps)
    return tl.sum(total, 1), norm


@triton.jit
def _load_tile(rows, first: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, EVICT: tl.constexpr):
    """Columns `first` and on of the rows that pointers [ROWS, 1] begin, zeros beyond K."""
    column = first + tl.arange(0, BLOCK)[None, :]
    if first + BLOCK <= K:  # a load without a mask is a wide one, whatever K
        return tl.load(rows + column, eviction_policy=EVICT)
    return tl.load(rows + column, mask=column < K, other=0.0, eviction_policy=EVICT)


@triton.jit
def _halves(y, ROWS: tl.constexpr):
    """The first and the second half of y [ROWS]."""
    return tl.split(tl.trans(tl.reshape(y, (2, ROWS // 2))))
